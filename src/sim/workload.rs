//! Requests: from a trace that the user brings, or made from a seed.

use std::time::Duration;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::toy::{VOCAB, mix};

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// When it comes.
    pub at: Duration,
    /// Tokens of its prompt, at least 1.
    pub prompt: u32,
    /// Tokens of its answer, at least 1.
    pub answer: u32,
    /// What its prompt is made of: one name for each run of
    /// [`shared_tokens`](Self::shared_tokens), equal where two prompts begin
    /// alike. Empty: a prompt of its own.
    pub shared: Vec<u64>,
    /// Tokens a name of `shared` stands for.
    pub shared_tokens: u32,
}

impl Job {
    /// The prompt's tokens; `own` names the request.
    pub fn tokens(&self, own: u64) -> Vec<u32> {
        let token = |i: u32| {
            let run = self.shared.get((i / self.shared_tokens.max(1)) as usize);
            let word = match run {
                Some(name) => mix(*name, u64::from(i % self.shared_tokens.max(1))),
                None => mix(own | 1 << 63, u64::from(i)),
            };
            (word % u64::from(VOCAB)) as u32
        };
        (0..self.prompt).map(token).collect()
    }
}

/// Formats of traces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `TIMESTAMP,ContextTokens,GeneratedTokens`, times of day.
    Azure,
    /// JSON lines: `timestamp` in ms, `input_length`, `output_length`,
    /// `hash_ids` of 512 tokens each.
    Mooncake,
    /// `Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type`,
    /// seconds.
    BurstGpt,
}

/// Reads up to `most` requests of a trace, the first at time 0.
pub fn read(format: Format, text: &str, most: usize) -> Result<Vec<Job>, String> {
    let mut jobs = Vec::new();
    let mut columns: Option<[usize; 3]> = None;
    let names = match format {
        Format::Azure => ["TIMESTAMP", "ContextTokens", "GeneratedTokens"],
        Format::BurstGpt => ["Timestamp", "Request tokens", "Response tokens"],
        Format::Mooncake => ["", "", ""],
    };
    for (line, number) in text.lines().zip(1..) {
        if jobs.len() >= most {
            break;
        }
        let line = line.trim_start_matches('\u{feff}').trim();
        if line.is_empty() {
            continue;
        }
        let job = match (format, columns) {
            (Format::Mooncake, _) => mooncake(line),
            (_, None) => {
                let fields: Vec<_> = line.split(',').map(str::trim).collect();
                let find = |name: &str| {
                    let at = fields.iter().position(|field| *field == name);
                    at.ok_or(format!("line {number}: no column {name:?} in {line:?}"))
                };
                columns = Some([find(names[0])?, find(names[1])?, find(names[2])?]);
                continue;
            }
            (_, Some(columns)) => row(format, line, &columns),
        };
        match job.map_err(|error| format!("line {number}: {error}"))? {
            // A request without an answer failed where the trace was taken.
            job if job.prompt > 0 && job.answer > 0 => jobs.push(job),
            _ => {}
        }
    }
    if jobs.is_empty() {
        return Err("no request in it".into());
    }
    let first = jobs.iter().map(|job| job.at).min().unwrap_or_default();
    jobs.iter_mut().for_each(|job| job.at -= first);
    jobs.sort_by_key(|job| job.at);
    Ok(jobs)
}

fn row(format: Format, line: &str, columns: &[usize; 3]) -> Result<Job, String> {
    let fields: Vec<_> = line.split(',').map(str::trim).collect();
    let field = |at: usize| fields.get(columns[at]).copied().ok_or(format!("{} fields only", fields.len()));
    let number = |at| {
        let text = field(at)?;
        text.parse::<u32>().map_err(|_| format!("{text:?} is not a number of tokens"))
    };
    let time = field(0)?;
    let at = match format {
        Format::Azure => time_of_day(time),
        _ => time.parse::<f64>().ok().and_then(|s| Duration::try_from_secs_f64(s).ok()),
    };
    let at = at.ok_or(format!("{time:?} is not a time"))?;
    Ok(Job { at, prompt: number(1)?, answer: number(2)?, shared: Vec::new(), shared_tokens: 0 })
}

/// `2023-11-16 18:15:46.6805900`: days are told apart, months are not needed.
fn time_of_day(text: &str) -> Option<Duration> {
    let (date, time) = text.split_once([' ', 'T'])?;
    let day: u64 = date.rsplit('-').next()?.parse().ok()?;
    let mut parts = time.trim_end_matches('Z').split('+').next()?.split(':');
    let (hours, minutes) = (parts.next()?.parse::<u64>().ok()?, parts.next()?.parse::<u64>().ok()?);
    let seconds: f64 = parts.next()?.parse().ok()?;
    Duration::try_from_secs_f64(seconds)
        .ok()?
        .checked_add(Duration::from_secs(((day * 24 + hours) * 60 + minutes) * 60))
}

fn mooncake(line: &str) -> Result<Job, String> {
    #[derive(serde::Deserialize)]
    struct Line {
        timestamp: f64,
        input_length: u32,
        output_length: u32,
        #[serde(default)]
        hash_ids: Vec<u64>,
    }
    let line: Line = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let at = Duration::try_from_secs_f64(line.timestamp / 1e3).map_err(|_| "timestamp is not a time")?;
    let (prompt, answer) = (line.input_length, line.output_length);
    Ok(Job { at, prompt, answer, shared: line.hash_ids, shared_tokens: 512 })
}

/// Requests from a seed: Poisson arrivals; lengths spread evenly on a
/// logarithmic scale, since contexts span orders of magnitude.
#[derive(Clone, Debug, PartialEq)]
pub struct Synthetic {
    /// How many.
    pub requests: usize,
    /// Arrivals a second.
    pub rate: f64,
    /// Least and most tokens of a prompt.
    pub prompt: (u32, u32),
    /// Least and most tokens of an answer.
    pub answer: (u32, u32),
    /// Share of requests whose prompt is drawn from `long` instead.
    pub long_share: f64,
    /// Least and most tokens of a long prompt.
    pub long: (u32, u32),
}

impl Synthetic {
    /// The requests.
    pub fn jobs(&self, seed: u64) -> Vec<Job> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut at = 0.0;
        let job = |_| {
            at += -(1.0 - rng.random::<f64>()).ln() / self.rate;
            let range = if rng.random_bool(self.long_share) { self.long } else { self.prompt };
            let (prompt, answer) = (length(&mut rng, range), length(&mut rng, self.answer));
            Job { at: Duration::from_secs_f64(at), prompt, answer, shared: Vec::new(), shared_tokens: 0 }
        };
        (0..self.requests).map(job).collect()
    }

    /// Mixes long prompts into a trace: every request becomes a long one with
    /// the share of `long_share`; times and answers stay.
    pub fn lengthen(&self, jobs: &mut [Job], seed: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for job in jobs {
            if rng.random_bool(self.long_share) {
                job.prompt = length(&mut rng, self.long);
                job.shared.clear();
            }
        }
    }
}

fn length(rng: &mut ChaCha8Rng, (least, most): (u32, u32)) -> u32 {
    let (low, high) = (f64::from(least.max(1)).ln(), f64::from(most.max(least).max(1)).ln());
    let drawn = (low + (high - low) * rng.random::<f64>()).exp();
    (drawn.round() as u32).clamp(least.max(1), most.max(least).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_formats_read() {
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 23:59:59.5000000,374,44\n\
                     2023-11-17 00:00:01.0000000,396,109\n2023-11-17 00:00:02.0000000,5,0\n";
        let jobs = read(Format::Azure, azure, 10).unwrap();
        assert_eq!(jobs.len(), 2, "one without an answer is left out");
        assert_eq!((jobs[1].at, jobs[1].prompt, jobs[1].answer), (Duration::from_millis(1500), 396, 109));
        let burst = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n\
                     5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,1087,230,1317,API log\n";
        let jobs = read(Format::BurstGpt, burst, 10).unwrap();
        assert_eq!((jobs[1].at, jobs[1].prompt, jobs[1].answer), (Duration::from_millis(40_500), 1087, 230));
        let mooncake = r#"{"timestamp": 0, "input_length": 1030, "output_length": 5, "hash_ids": [0, 1, 2]}
            {"timestamp": 27, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 9]}"#;
        let jobs = read(Format::Mooncake, mooncake, 10).unwrap();
        let (a, b) = (jobs[0].tokens(1), jobs[1].tokens(2));
        assert_eq!(a.len(), 1030);
        assert!(a[..1024] == b[..1024] && a[1024..1030] != b[1024..1030], "what has the same name is the same");
        assert_eq!(read(Format::Mooncake, mooncake, 1).unwrap().len(), 1);
    }

    #[test]
    fn errors_name_the_line() {
        let read = |format, text| read(format, text, 10).unwrap_err();
        assert!(read(Format::Azure, "TIMESTAMP,ContextTokens\n").contains("GeneratedTokens"));
        let bad = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,many,4\n";
        assert_eq!(read(Format::Azure, bad), "line 2: \"many\" is not a number of tokens");
        assert!(read(Format::Mooncake, "{\"timestamp\": 1}").starts_with("line 1: missing field"));
        assert!(read(Format::Azure, "").contains("no request"));
    }

    #[test]
    fn synthetic_requests_keep_to_their_ranges() {
        let synthetic = Synthetic {
            requests: 2000,
            rate: 10.0,
            prompt: (10, 1000),
            answer: (1, 50),
            long_share: 0.1,
            long: (100_000, 2_000_000),
        };
        let jobs = synthetic.jobs(7);
        assert_eq!(jobs, synthetic.jobs(7));
        let long = jobs.iter().filter(|job| job.prompt >= 100_000).count();
        assert!((120..300).contains(&long), "{long}");
        assert!(jobs.iter().all(|job| job.prompt <= 2_000_000 && (1..=50).contains(&job.answer)));
        assert!((150.0..260.0).contains(&jobs.last().unwrap().at.as_secs_f64()));
        assert_eq!(jobs[0].tokens(1), jobs[0].tokens(1));
        assert_ne!(jobs[0].tokens(1), jobs[0].tokens(2));
    }
}

//! What every benchmark prints: an aligned table of latencies and figures, and
//! on request the same as JSON, as HdrHistogram percentile files and as a plot.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use plotters::prelude::*;
use serde_json::{Value, json};

/// Where a benchmark's results go besides the table.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Output {
    /// Write the results as JSON to FILE; `-` prints them instead of the table.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write each latency distribution in HdrHistogram's percentile format (µs);
    /// several go to FILE with their names put before its extension.
    #[arg(long, value_name = "FILE")]
    pub hgrm: Option<PathBuf>,
    /// Plot latency by percentile to an SVG file.
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

/// A benchmark's results as they come in.
pub struct Report {
    title: String,
    latencies: Vec<Latency>,
    figures: Vec<Figure>,
    notes: Vec<String>,
}

/// A distribution of durations in nanoseconds.
struct Latency {
    name: String,
    histogram: Histogram<u64>,
    /// Bytes that one operation moves, if that is of interest.
    bytes: Option<u64>,
}

struct Figure {
    name: String,
    value: f64,
    unit: String,
}

/// An empty histogram of nanoseconds: 1 ns to an hour, three digits.
pub fn histogram() -> Histogram<u64> {
    let made = Histogram::new_with_bounds(1, 3_600_000_000_000, 3);
    // The bounds are constants that the library accepts.
    made.unwrap_or_else(|e| unreachable!("histogram bounds: {e}"))
}

/// The percentiles of the table: name and quantile.
const PERCENTILES: [(&str, f64); 4] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)];

impl Report {
    /// An empty report.
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), latencies: Vec::new(), figures: Vec::new(), notes: Vec::new() }
    }

    /// Adds a distribution of durations in ns.
    pub fn latency(&mut self, name: impl Into<String>, histogram: Histogram<u64>) {
        self.latencies.push(Latency { name: name.into(), histogram, bytes: None });
    }

    /// Adds a distribution of durations in ns of operations that move `bytes`
    /// each: the table shows their bandwidth at the mean.
    pub fn transfer(&mut self, name: impl Into<String>, histogram: Histogram<u64>, bytes: u64) {
        self.latencies.push(Latency { name: name.into(), histogram, bytes: Some(bytes) });
    }

    /// Adds a single figure.
    pub fn figure(&mut self, name: impl Into<String>, value: f64, unit: impl Into<String>) {
        self.figures.push(Figure { name: name.into(), value, unit: unit.into() });
    }

    /// Says something about the run that no figure says.
    pub fn note(&mut self, what: impl Into<String>) {
        self.notes.push(what.into());
    }

    /// Prints the table and writes the files that `output` asks for.
    pub fn emit(&self, output: &Output) -> Result<()> {
        match &output.json {
            Some(path) if path == Path::new("-") => {
                let text = serde_json::to_string_pretty(&self.to_json())?;
                writeln!(std::io::stdout(), "{text}")?;
            }
            Some(path) => {
                let text = serde_json::to_string_pretty(&self.to_json())? + "\n";
                std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
                write!(std::io::stdout(), "{}", self.table())?;
            }
            None => write!(std::io::stdout(), "{}", self.table())?,
        }
        if let Some(path) = &output.hgrm {
            self.write_hgrm(path)?;
        }
        if let Some(path) = &output.plot {
            self.plot(path)?;
        }
        Ok(())
    }

    /// The aligned table.
    pub fn table(&self) -> String {
        let mut text = format!("{}\n", self.title);
        let wide = |names: &mut dyn Iterator<Item = &String>| names.map(|n| n.chars().count()).max().unwrap_or(0);
        if !self.latencies.is_empty() {
            let head = "latency, µs";
            let name = wide(&mut self.latencies.iter().map(|l| &l.name)).max(head.chars().count());
            let with_bytes = self.latencies.iter().any(|l| l.bytes.is_some());
            let _ = write!(text, "\n{head:name$}  {:>9}  {:>9}", "samples", "min");
            for (percentile, _) in PERCENTILES {
                let _ = write!(text, "  {percentile:>9}");
            }
            let _ = write!(text, "  {:>9}  {:>9}", "max", "mean");
            text.push_str(if with_bytes { "       GB/s\n" } else { "\n" });
            for latency in &self.latencies {
                let h = &latency.histogram;
                let _ = write!(text, "{:name$}  {:>9}  {:>9}", latency.name, h.len(), micros(h.min() as f64));
                for (_, quantile) in PERCENTILES {
                    let _ = write!(text, "  {:>9}", micros(h.value_at_quantile(quantile) as f64));
                }
                let _ = write!(text, "  {:>9}  {:>9}", micros(h.max() as f64), micros(h.mean()));
                if let Some(bandwidth) = latency.bandwidth() {
                    let _ = write!(text, "  {bandwidth:>9.3}");
                }
                text.push('\n');
            }
        }
        if !self.figures.is_empty() {
            let name = wide(&mut self.figures.iter().map(|f| &f.name));
            text.push('\n');
            for Figure { name: what, value, unit } in &self.figures {
                let _ = writeln!(text, "{what:name$}  {:>12} {unit}", short(*value));
            }
        }
        if !self.notes.is_empty() {
            text.push('\n');
            self.notes.iter().for_each(|note| text.extend([note, "\n"]));
        }
        text
    }

    /// Everything, for a program.
    pub fn to_json(&self) -> Value {
        let latencies: Vec<_> = self.latencies.iter().map(Latency::to_json).collect();
        let figures: Vec<_> =
            self.figures.iter().map(|f| json!({ "name": f.name, "value": f.value, "unit": f.unit })).collect();
        json!({ "title": self.title, "latencies": latencies, "figures": figures, "notes": self.notes })
    }

    fn write_hgrm(&self, path: &Path) -> Result<()> {
        for latency in &self.latencies {
            let path = if self.latencies.len() == 1 { path.to_owned() } else { named(path, &latency.name) };
            std::fs::write(&path, latency.hgrm()).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }

    /// Latency (logarithmic) by percentile (by the logarithm of its distance
    /// from 100 %).
    fn plot(&self, path: &Path) -> Result<()> {
        let shown: Vec<_> = self.latencies.iter().filter(|l| !l.histogram.is_empty()).collect();
        if shown.is_empty() {
            bail!("nothing was measured that could be plotted to {}", path.display());
        }
        self.draw(&shown, path).with_context(|| format!("cannot plot to {}", path.display()))
    }

    fn draw(&self, shown: &[&Latency], path: &Path) -> Result<()> {
        let lowest = shown.iter().map(|l| l.histogram.min()).min().unwrap_or(1).max(1) as f64 / 1e3;
        let highest = shown.iter().map(|l| l.histogram.max()).max().unwrap_or(1).max(1) as f64 / 1e3;
        let nines = shown.iter().map(|l| l.histogram.len()).max().unwrap_or(10).max(10) as f64;
        let height = 360 + 18 * shown.len() as u32;
        let root = SVGBackend::new(path, (960, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let (left, legend) = root.split_horizontally(740);
        let mut chart = ChartBuilder::on(&left)
            .caption(&self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(64)
            .build_cartesian_2d((1f64..nines).log_scale(), (lowest * 0.9..highest * 1.1).log_scale())?;
        let percentile = |x: &f64| format!("{}%", short(100.0 - 100.0 / x));
        chart
            .configure_mesh()
            .x_desc("percentile")
            .y_desc("latency, µs")
            .x_label_formatter(&percentile)
            .y_label_formatter(&|y| short(*y))
            .light_line_style(RGBColor(235, 235, 235))
            .draw()?;
        for (i, latency) in shown.iter().enumerate() {
            let colour = HSLColor(i as f64 / shown.len() as f64, 0.75, 0.42);
            let points = latency.histogram.iter_quantiles(5).map(|v| {
                let x = (1.0 / (1.0 - v.quantile_iterated_to()).max(1.0 / nines)).max(1.0);
                (x, v.value_iterated_to() as f64 / 1e3)
            });
            chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
            let y = 40 + 18 * i as i32;
            legend.draw(&PathElement::new([(4, y + 7), (24, y + 7)], colour.stroke_width(2)))?;
            legend.draw(&Text::new(latency.name.clone(), (30, y), ("sans-serif", 13)))?;
        }
        root.present()?;
        Ok(())
    }
}

impl Latency {
    /// GB/s at the mean.
    fn bandwidth(&self) -> Option<f64> {
        let mean = self.histogram.mean();
        self.bytes.filter(|_| mean > 0.0).map(|bytes| bytes as f64 / mean)
    }

    fn to_json(&self) -> Value {
        let h = &self.histogram;
        json!({
            "name": self.name,
            "unit": "ns",
            "count": h.len(),
            "min": h.min(),
            "p50": h.value_at_quantile(0.5),
            "p90": h.value_at_quantile(0.9),
            "p99": h.value_at_quantile(0.99),
            "p99.9": h.value_at_quantile(0.999),
            "max": h.max(),
            "mean": h.mean(),
            "stdev": h.stdev(),
            "bytes": self.bytes,
            "gigabytes_per_second": self.bandwidth(),
        })
    }

    /// HdrHistogram's percentile distribution, in µs.
    fn hgrm(&self) -> String {
        let h = &self.histogram;
        let mut text =
            format!("{:>12} {:>14} {:>10} {:>14}\n\n", "Value", "Percentile", "TotalCount", "1/(1-Percentile)");
        let mut count = 0;
        for v in h.iter_quantiles(5) {
            let (value, quantile) = (v.value_iterated_to() as f64 / 1e3, v.quantile_iterated_to());
            count += v.count_since_last_iteration();
            let _ = write!(text, "{value:>12.3} {quantile:>14.12} {count:>10}");
            let _ = if quantile < 1.0 { writeln!(text, " {:>14.2}", 1.0 / (1.0 - quantile)) } else { writeln!(text) };
        }
        let (mean, deviation, max) = (h.mean() / 1e3, h.stdev() / 1e3, h.max() as f64 / 1e3);
        let _ = writeln!(text, "#[Mean    = {mean:>12.3}, StdDeviation   = {deviation:>12.3}]");
        let _ = writeln!(text, "#[Max     = {max:>12.3}, Total count    = {:>12}]", h.len());
        let _ = writeln!(text, "#[Buckets = {:>12}, SubBuckets     = {:>12}]", h.buckets(), 2048);
        text
    }
}

/// `path` with a name put before its extension.
fn named(path: &Path, name: &str) -> PathBuf {
    let plain: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map_or("hgrm".into(), |e| e.to_string_lossy());
    path.with_file_name(format!("{stem}.{plain}.{extension}"))
}

/// Nanoseconds as µs with a precision that fits them.
fn micros(nanos: f64) -> String {
    let micros = nanos / 1e3;
    if micros < 1000.0 { format!("{micros:.3}") } else { format!("{micros:.0}") }
}

/// About four significant digits.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 1000.0 => 0,
        v if v >= 100.0 => 1,
        v if v >= 10.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::new("a bench");
        let mut h = histogram();
        (1..=10_000).for_each(|ns| h.record(ns).unwrap());
        report.transfer("tcp 64 B", h.clone(), 64);
        h.record(5_000_000).unwrap();
        report.latency("shm", h);
        report.figure("ratio", 1.0625, "×");
        report.note("shm: not measured");
        report
    }

    #[test]
    fn the_table_is_aligned_and_complete() {
        let table = report().table();
        let lines: Vec<_> = table.lines().collect();
        assert!(lines[2].starts_with("latency, µs") && lines[2].ends_with("GB/s"), "{table}");
        let ends = |line: &str| line.chars().count();
        assert_eq!(ends(lines[2]), ends(lines[3]), "{table}");
        assert!(lines[3].contains("5.00") && lines[4].contains("5001"), "{table}");
        assert!(table.contains("ratio") && table.contains("1.062 ×"), "{table}");
        assert!(table.ends_with("\nshm: not measured\n"), "{table}");
    }

    #[test]
    fn json_and_files_tell_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| Some(folder.path().join(name));
        let output = Output { json: at("r.json"), hgrm: at("r.hgrm"), plot: at("r.svg") };
        report().emit(&output).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        let json: Value = serde_json::from_str(&read("r.json")).unwrap();
        assert_eq!(json["latencies"][0]["count"], 10_000);
        assert_eq!(json["figures"][0]["value"], 1.0625);
        assert_eq!(json["notes"][0], "shm: not measured");
        let hgrm = read("r.tcp-64-B.hgrm");
        assert!(hgrm.lines().any(|line| line.contains(" 0.500000000000 ") && line.contains("5000")), "{hgrm}");
        assert!(hgrm.contains("Total count    =        10000"), "{hgrm}");
        assert!(folder.path().join("r.shm.hgrm").exists());
        let svg = read("r.svg");
        assert!(svg.contains("</svg>") && svg.contains("tcp 64 B") && svg.contains("polyline"), "no plot");
    }

    #[test]
    fn a_plot_of_nothing_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let output = Output { plot: Some(folder.path().join("r.svg")), ..Output::default() };
        assert!(Report::new("empty").emit(&output).is_err());
    }
}

//! `distkv status`: the cluster as one node knows it.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde_json::Value;

/// Planned moves shown, the latest first.
const DECISIONS: usize = 8;

/// Show the cluster: instances, memory, load, loans, links.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:\n  distkv status\n  distkv status --url http://node7:8000 --watch\n  \
                        distkv status --json | jq .loans")]
pub struct Args {
    /// Any node of the cluster.
    #[arg(long, env = "DISTKV_URL", default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Print the node's JSON as it is.
    #[arg(long)]
    pub json: bool,
    /// Show it again every second until interrupted.
    #[arg(long)]
    pub watch: bool,
    /// Key of a server started with --api-key.
    #[arg(long, env = "DISTKV_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
}

/// Prints the cluster's state on stdout.
pub fn run(args: Args) -> anyhow::Result<()> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(10)))
        .http_status_as_error(false)
        .build()
        .into();
    loop {
        let cluster = fetch(&agent, &args)?;
        let mut text = if args.json { format!("{cluster}\n") } else { render(&cluster) };
        if args.watch && !args.json {
            // Home and clear to the end: no flicker, unlike clearing first.
            text = format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n"));
        }
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            // `status --watch | head` is done when head is.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.context("cannot write the status")?,
        }
        drop(stdout);
        if !args.watch {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn fetch(agent: &ureq::Agent, args: &Args) -> anyhow::Result<Value> {
    let base = args.url.trim_end_matches('/');
    let url = if base.contains("://") { format!("{base}/cluster") } else { format!("http://{base}/cluster") };
    let mut request = agent.get(&url);
    if let Some(key) = &args.api_key {
        request = request.header("Authorization", format!("Bearer {key}"));
    }
    let mut response = request
        .call()
        .map_err(|error| anyhow!("cannot reach {url} ({error}); is a node serving there? Name one with --url"))?;
    let status = response.status();
    let body = response.body_mut().read_to_string().with_context(|| format!("{url} broke off its answer"))?;
    let json: Result<Value, _> = serde_json::from_str(&body);
    if !status.is_success() {
        let message = json.ok().and_then(|body| body.pointer("/error/message")?.as_str().map(str::to_owned));
        bail!("{url} answered {status}{}", message.map_or(String::new(), |message| format!(": {message}")));
    }
    json.with_context(|| format!("{url} answered no JSON; is it a distkv node?"))
}

/// What people read: a summary and a table for each list.
fn render(cluster: &Value) -> String {
    let list = |name: &str| cluster[name].as_array().map(Vec::as_slice).unwrap_or_default();
    let instances = list("instances");
    let mut out = summary(cluster, instances);
    out += &table(
        &[
            "INSTANCE", "RANK", "MODEL", "HTTP", "STATE", "BLOCKS", "FREE", "CACHED", "LENT", "BORROWED", "TOKENS",
            "RUNNING", "WAITING", "TOK/S", "ROW AGE",
        ],
        instances.iter().map(|instance| instance_row(cluster, instance)),
    );
    let loans = list("loans");
    if !loans.is_empty() {
        out += "\n";
        out += &table(
            &["LOAN", "DEBTOR", "", "CREDITOR", "REQUEST", "BLOCKS", "EPOCH"],
            loans.iter().map(|loan| {
                let cell = |name: &str| text(&loan[name]);
                vec![
                    cell("id"),
                    cell("debtor"),
                    "->".into(),
                    cell("creditor"),
                    cell("request"),
                    cell("blocks"),
                    cell("epoch"),
                ]
            }),
        );
    }
    let debts = list("debts");
    if !debts.is_empty() {
        out += "\n";
        out += &table(
            &["DEBTS OF ALL", "", "CREDITOR", "BLOCKS"],
            debts
                .iter()
                .map(|debt| vec![text(&debt["debtor"]), "owes".into(), text(&debt["creditor"]), text(&debt["blocks"])]),
        );
    }
    let links = list("links");
    if !links.is_empty() {
        out += "\n";
        out += &table(
            &["FROM", "", "TO", "TRANSPORT", "RTT"],
            links.iter().map(|link| {
                let rtt = link["rtt_us"].as_f64().map_or("-".into(), |us| format!("{us:.1} us"));
                vec![text(&link["from"]), "->".into(), text(&link["to"]), text(&link["transport"]), rtt]
            }),
        );
    }
    let decisions = list("decisions");
    if !decisions.is_empty() {
        out += "\n";
        out += &table(
            &["PLANNED", "REQUEST", "BLOCKS", "FROM", "", "TO", "WHY", "BECAUSE"],
            decisions.iter().take(DECISIONS).map(|decision| {
                let cell = |name: &str| text(&decision[name]);
                let age = decision["age_ms"].as_u64().map_or("-".into(), |ms| format!("{} s", ms / 1000));
                let (from, to) = (cell("from"), cell("to"));
                vec![age, cell("request"), cell("blocks"), from, "->".into(), to, cell("why"), cell("because")]
            }),
        );
    }
    if let Some(latency) = cluster["latency"].as_object().filter(|map| map.values().any(|l| l["count"] != 0)) {
        out += "\n";
        out += &table(
            &["LATENCY OF THIS NODE", "COUNT", "P50", "P90", "P99", "MAX"],
            latency.iter().map(|(name, figures)| {
                let ms = |q: &str| figures[q].as_f64().map_or("-".into(), |ms| format!("{ms:.1} ms"));
                let mut row = vec![clean(name), text(&figures["count"])];
                row.extend(["p50_ms", "p90_ms", "p99_ms", "max_ms"].map(ms));
                row
            }),
        );
    }
    for name in ["moves", "recovery", "requests"] {
        let Some(figures) = cluster[name].as_object().filter(|map| map.values().any(|n| *n != 0)) else { continue };
        out += &format!("\n{name}:");
        for (name, value) in figures {
            out += &format!(" {} {}", clean(name), text(value));
        }
        out += "\n";
    }
    out
}

/// One line: how many instances, how much memory in all.
fn summary(cluster: &Value, instances: &[Value]) -> String {
    let sum = |name: &str| instances.iter().filter_map(|instance| instance[name].as_u64()).sum::<u64>();
    let tokens = |name: &str| {
        let of = |i: &Value| Some(i[name].as_u64()?.saturating_mul(i["block_tokens"].as_u64()?));
        instances.iter().filter_map(of).sum::<u64>()
    };
    let plural = if instances.len() == 1 { "" } else { "s" };
    format!(
        "{} instance{plural} as {} knows them: {} rBlocks ({} tokens), {} free ({} tokens), {} lent; {} running, {} waiting\n\n",
        instances.len(),
        text(&cluster["self"]),
        sum("blocks_total"),
        tokens("blocks_total"),
        sum("blocks_free"),
        tokens("blocks_free"),
        sum("blocks_lent"),
        sum("running"),
        sum("waiting"),
    )
}

fn instance_row(cluster: &Value, instance: &Value) -> Vec<String> {
    let cell = |name: &str| text(&instance[name]);
    let own = !instance["id"].is_null() && instance["id"] == cluster["self"];
    let tokens = match (instance["blocks_total"].as_u64(), instance["block_tokens"].as_u64()) {
        (Some(blocks), Some(tokens)) => blocks.saturating_mul(tokens).to_string(),
        _ => "-".into(),
    };
    let heard = match instance["row_age_ms"].as_u64() {
        _ if own => "self".into(),
        Some(ms) if ms < 10_000 => format!("{ms} ms"),
        Some(ms) => format!("{} s", ms / 1000),
        None => "-".into(),
    };
    // A pure lender has no model.
    let model = if instance["model"].is_null() { "(lender)".into() } else { cell("model") };
    vec![
        format!("{}{}", cell("id"), if own { "*" } else { "" }),
        cell("rank"),
        model,
        cell("http"),
        cell("state"),
        cell("blocks_total"),
        cell("blocks_free"),
        cell("blocks_cached"),
        cell("blocks_lent"),
        cell("blocks_borrowed"),
        tokens,
        cell("running"),
        cell("waiting"),
        cell("tokens_s"),
        heard,
    ]
}

/// A value in a cell; "-" where the node says nothing.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => clean(text),
        other => clean(&other.to_string()),
    }
}

/// Without control characters: what another machine says must not steer this
/// terminal.
fn clean(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.chars().filter(|c| !c.is_control()).collect() }
}

/// Columns aligned: to the right those that hold figures.
fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let rows: Vec<Vec<String>> = rows.collect();
    let figure =
        |cell: &str| cell == "-" || cell.starts_with(|c: char| c.is_ascii_digit()) && !cell.contains([':', '.']);
    let measured = |cell: &str| cell.ends_with(" ms") || cell.ends_with(" us") || cell.ends_with(" s");
    let columns: Vec<(usize, bool)> = (0..head.len())
        .map(|column| {
            let cells = || rows.iter().filter_map(move |row| row.get(column));
            let width = cells().map(|cell| cell.chars().count()).max().unwrap_or(0).max(head[column].len());
            let mut any = cells().peekable();
            (width, any.peek().is_some() && any.all(|cell| figure(cell) || measured(cell) || cell == "self"))
        })
        .collect();
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (cell, &(width, right)) in cells.zip(&columns) {
            if right {
                line += &format!("{cell:>width$}  ");
            } else {
                line += &format!("{cell:<width$}  ");
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    };
    line(&mut head.iter().copied());
    for row in &rows {
        line(&mut row.iter().map(String::as_str));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_cluster_is_a_table() {
        let cluster = json!({
            "self": "a",
            "instances": [
                {"id": "a", "rank": 0, "model": "toy", "http": "127.0.0.1:8000", "state": "ready", "blocks_total": 128,
                 "blocks_free": 4, "blocks_cached": 9, "blocks_lent": 0, "blocks_borrowed": 70, "block_tokens": 16,
                 "running": 1, "waiting": 0, "row_age_ms": 0},
                {"id": "b", "rank": 1, "model": null, "http": "127.0.0.1:8001", "state": "ready", "blocks_total": 1000,
                 "blocks_free": 930, "blocks_lent": 70, "blocks_borrowed": 0, "block_tokens": 16, "running": 0,
                 "waiting": 0, "row_age_ms": 12},
            ],
            "loans": [{"id": 7, "debtor": "a", "creditor": "b", "request": 3, "blocks": 70, "epoch": 1}],
            "debts": [{"debtor": "a", "creditor": "b", "blocks": 70}],
            "links": [{"from": "a", "to": "b", "transport": "shm", "rtt_us": 8.25}],
            "decisions": [{"age_ms": 2100, "request": 3, "blocks": 70, "from": "b", "to": "home",
                           "why": "creditor_leaves", "because": "it is draining"}],
            "moves": {"sent_blocks": 0, "fetched_blocks": 12},
            "recovery": {"recoveries": 1, "recomputed_tokens": 48},
            "requests": {"placed_elsewhere": 3, "continued": 1},
        });
        let expected = "\
2 instances as a knows them: 1128 rBlocks (18048 tokens), 934 free (14944 tokens), 70 lent; 1 running, 0 waiting

INSTANCE  RANK  MODEL     HTTP            STATE  BLOCKS  FREE  CACHED  LENT  BORROWED  TOKENS  RUNNING  WAITING  TOK/S  ROW AGE
a*           0  toy       127.0.0.1:8000  ready     128     4       9     0        70    2048        1        0      -     self
b            1  (lender)  127.0.0.1:8001  ready    1000   930       -    70         0   16000        0        0      -    12 ms

LOAN  DEBTOR      CREDITOR  REQUEST  BLOCKS  EPOCH
   7  a       ->  b               3      70      1

DEBTS OF ALL        CREDITOR  BLOCKS
a             owes  b             70

FROM      TO  TRANSPORT     RTT
a     ->  b   shm        8.2 us

PLANNED  REQUEST  BLOCKS  FROM      TO    WHY              BECAUSE
    2 s        3      70  b     ->  home  creditor_leaves  it is draining

moves: sent_blocks 0 fetched_blocks 12

recovery: recoveries 1 recomputed_tokens 48

requests: placed_elsewhere 3 continued 1
";
        let shown = render(&cluster);
        assert_eq!(shown, expected, "\n{shown}");
    }

    #[test]
    fn missing_fields_and_odd_ones_are_no_error() {
        for cluster in [json!({}), json!([]), json!({"instances": [{}], "loans": [{}, 3], "links": [{"rtt_us": "x"}]})]
        {
            assert!(render(&cluster).contains("INSTANCE"));
        }
        assert!(render(&json!({"instances": [{"id": "a\u{1b}[2J"}]})).contains("a[2J"));
    }

    #[test]
    fn an_absent_node_is_one_clear_line() {
        // Bound and dropped: nobody listens there.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let args = Args { url: address.to_string(), json: false, watch: false, api_key: None };
        let error = format!("{:#}", run(args).unwrap_err());
        assert!(error.contains(&format!("cannot reach http://{address}/cluster")), "{error}");
        assert!(error.contains("--url") && !error.contains('\n'), "{error}");
    }
}

//! Values as Python prints them: templates were written for Jinja on Python, so
//! a number, a truth value or a dictionary must come out as it does there.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Value as Jinja, ValueKind};
use serde_json::Value;

/// `str(value)`; an undefined value is empty.
pub(super) fn str(value: &Jinja) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().map_or_else(|| value.to_string(), str::to_owned),
        _ => repr(value),
    }
}

fn repr(value: &Jinja) -> String {
    match value.kind() {
        ValueKind::Undefined => "Undefined".into(),
        ValueKind::None => "None".into(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.into(),
        ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).map_or(value.to_string(), float),
        ValueKind::String => quote(value.as_str().unwrap_or_default()),
        ValueKind::Seq => match value.try_iter() {
            Ok(items) => format!("[{}]", items.map(|v| repr(&v)).collect::<Vec<_>>().join(", ")),
            Err(_) => value.to_string(),
        },
        ValueKind::Map => match value.try_iter() {
            Ok(keys) => {
                let pair = |key: Jinja| {
                    let item = value.get_item(&key).unwrap_or_default();
                    format!("{}: {}", repr(&key), repr(&item))
                };
                format!("{{{}}}", keys.map(pair).collect::<Vec<_>>().join(", "))
            }
            Err(_) => value.to_string(),
        },
        _ => value.to_string(),
    }
}

/// `repr` of a text: single quotes unless there are only single ones inside.
fn quote(text: &str) -> String {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(mark);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark => out.extend(['\\', c]),
            c if u32::from(c) < 0x20 || u32::from(c) == 0x7f => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(mark);
    out
}

/// `repr` of a float: shortest digits that give it back.
fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.into();
    }
    // Rust changes to exponents where Python does; only their form differs.
    let text = format!("{x:?}");
    match text.split_once('e') {
        None => text,
        Some((digits, exponent)) => {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(rest) => ('-', rest),
                None => ('+', exponent),
            };
            format!("{}e{sign}{exponent:0>2}", digits.strip_suffix(".0").unwrap_or(digits))
        }
    }
}

/// Arguments of `json.dumps`.
#[derive(Default)]
pub(super) struct Json {
    pub ensure_ascii: bool,
    pub sort_keys: bool,
    pub indent: Option<usize>,
    pub separators: Option<(String, String)>,
}

impl Json {
    pub fn dumps(&self, value: &Value) -> String {
        let mut out = String::new();
        self.write(value, 0, &mut out);
        out
    }

    fn write(&self, value: &Value, depth: usize, out: &mut String) {
        match value {
            Value::Number(n) => match n.as_f64().filter(|_| n.is_f64()) {
                Some(x) => out.push_str(&float(x)),
                None => out.push_str(&n.to_string()),
            },
            Value::String(text) => self.string(text, out),
            Value::Array(items) => {
                self.list(['[', ']'], items.len(), depth, out, |i, out| self.write(&items[i], depth + 1, out));
            }
            Value::Object(map) => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|(name, _)| *name);
                }
                self.list(['{', '}'], entries.len(), depth, out, |i, out| {
                    self.string(entries[i].0, out);
                    out.push_str(self.separators.as_ref().map_or(": ", |s| &s.1));
                    self.write(entries[i].1, depth + 1, out);
                });
            }
            plain => out.push_str(&plain.to_string()),
        }
    }

    fn list(
        &self,
        brackets: [char; 2],
        len: usize,
        depth: usize,
        out: &mut String,
        mut item: impl FnMut(usize, &mut String),
    ) {
        let newline = |depth: usize, out: &mut String| {
            if let Some(indent) = self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent * depth));
            }
        };
        let separator = match (&self.separators, self.indent) {
            (Some((item, _)), _) => item,
            (None, Some(_)) => ",",
            (None, None) => ", ",
        };
        out.push(brackets[0]);
        for i in 0..len {
            if i > 0 {
                out.push_str(separator);
            }
            newline(depth + 1, out);
            item(i, out);
        }
        if len > 0 {
            newline(depth, out);
        }
        out.push(brackets[1]);
    }

    fn string(&self, text: &str, out: &mut String) {
        let quoted = Value::String(text.to_owned()).to_string();
        if !self.ensure_ascii {
            out.push_str(&quoted);
            return;
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                out.push(c);
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
}

/// `datetime.now().strftime(format)`, in UTC. Directives that are not known
/// stay as they are.
pub(super) fn strftime_utc(format: &str, now: SystemTime) -> String {
    const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (weekday, month_name) = (DAYS[((days + 4) % 7) as usize], MONTHS[month as usize - 1]);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        // Writing to a String cannot fail.
        let _ = match directive {
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:02}", year % 100),
            Some('m') => write!(out, "{month:02}"),
            Some('d') => write!(out, "{day:02}"),
            Some('e') => write!(out, "{day:2}"),
            Some('B') => write!(out, "{month_name}"),
            Some('b' | 'h') => write!(out, "{}", &month_name[..3]),
            Some('A') => write!(out, "{weekday}"),
            Some('a') => write!(out, "{}", &weekday[..3]),
            Some('H') => write!(out, "{hour:02}"),
            Some('I') => write!(out, "{:02}", (hour + 11) % 12 + 1),
            Some('p') => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            Some('M') => write!(out, "{minute:02}"),
            Some('S') => write!(out, "{:02}", second % 60),
            Some('F') => write!(out, "{year}-{month:02}-{day:02}"),
            Some('T') => write!(out, "{hour:02}:{minute:02}:{:02}", second % 60),
            Some('Z') => write!(out, "UTC"),
            Some('%') => write!(out, "%"),
            Some(other) => write!(out, "%{other}"),
            None => write!(out, "%"),
        };
    }
    out
}

/// Year, month and day of a day after 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years that begin in March end in the leap day; 400 of them repeat.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_are_gregorian() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(strftime_utc("%d %b %Y %H:%M:%S %A", at(0)), "01 Jan 1970 00:00:00 Thursday");
        assert_eq!(strftime_utc("%Y-%m-%d %p%I", at(951_825_600)), "2000-02-29 PM12");
        assert_eq!(
            strftime_utc("%B %e, %y 100%% %Q", at(4_107_542_399)),
            "February 28, 00 100%% %Q".replace("%%", "%")
        );
    }

    #[test]
    fn floats_are_pythons() {
        for (x, text) in [(1.0, "1.0"), (0.1, "0.1"), (1e16, "1e+16"), (1.5e-7, "1.5e-07"), (-2e300, "-2e+300")] {
            assert_eq!(float(x), text);
        }
    }

    #[test]
    fn values_print_as_in_python() {
        let value = serde_json::json!({"a": [1, 2.5, true, null], "b": "it's", "c": "say \"it's\"\n"});
        let expected = r#"{'a': [1, 2.5, True, None], 'b': "it's", 'c': 'say "it\'s"\n'}"#;
        assert_eq!(str(&Jinja::from_serialize(&value)), expected);
    }

    #[test]
    fn json_is_pythons_dumps() {
        let value = serde_json::json!({"b": [1, "é😀"], "a": {}, "c": []});
        assert_eq!(Json::default().dumps(&value), r#"{"b": [1, "é😀"], "a": {}, "c": []}"#);
        let all = Json { ensure_ascii: true, sort_keys: true, indent: Some(2), separators: None };
        let expected = "{\n  \"a\": {},\n  \"b\": [\n    1,\n    \"\\u00e9\\ud83d\\ude00\"\n  ],\n  \"c\": []\n}";
        assert_eq!(all.dumps(&value), expected);
    }
}

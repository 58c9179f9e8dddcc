//! Prometheus' text format (version 0.0.4) for figures that are computed when somebody asks for them: a GPU that is gone is
//! then gone from here too, which gauges that somebody once set would not be.

use std::fmt::Write as _;

/// What the answer's `Content-Type` says.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Builds one page. Each family is written once, with its help and type before its samples.
#[derive(Debug, Default)]
pub struct Exposition {
    text: String,
}

/// Samples of the family begun last.
#[derive(Debug)]
pub struct Family<'a> {
    text: &'a mut String,
    name: &'static str,
}

impl Exposition {
    pub fn gauge(&mut self, name: &'static str, help: &str) -> Family<'_> {
        self.family(name, help, "gauge")
    }

    pub fn counter(&mut self, name: &'static str, help: &str) -> Family<'_> {
        self.family(name, help, "counter")
    }

    fn family(&mut self, name: &'static str, help: &str, kind: &str) -> Family<'_> {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {}\n# TYPE {name} {kind}", escaped(help, false));
        Family { text: &mut self.text, name }
    }

    /// Families that somebody else has written.
    pub fn append(&mut self, rendered: &str) {
        self.text.push_str(rendered);
        if !rendered.is_empty() && !rendered.ends_with('\n') {
            self.text.push('\n');
        }
    }

    pub fn into_text(self) -> String {
        self.text
    }
}

impl Family<'_> {
    pub fn value(&mut self, value: f64) -> &mut Self {
        self.sample(&[], value)
    }

    pub fn sample(&mut self, labels: &[(&str, &str)], value: f64) -> &mut Self {
        self.text.push_str(self.name);
        for (index, (name, text)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{before}{name}=\"{}\"", escaped(text, true));
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = match value {
            v if v == f64::INFINITY => writeln!(self.text, " +Inf"),
            v if v == f64::NEG_INFINITY => writeln!(self.text, " -Inf"),
            v => writeln!(self.text, " {v}"),
        };
        self
    }
}

fn escaped(text: &str, quotes: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '"' if quotes => out.push_str("\\\""),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_families_have_help_and_type() {
        let mut page = Exposition::default();
        page.gauge("a_bytes", "one\nline").sample(&[("gpu_id", "x\"y\\z\n"), ("kind", "free")], 1.5).value(2.0);
        page.counter("b_total", "b").value(f64::INFINITY);
        page.append("c 1");
        let expected = "# HELP a_bytes one\\nline\n# TYPE a_bytes gauge\na_bytes{gpu_id=\"x\\\"y\\\\z\\n\",kind=\"free\"} 1.5\na_bytes 2\n\
                        # HELP b_total b\n# TYPE b_total counter\nb_total +Inf\nc 1\n";
        assert_eq!(page.into_text(), expected);
    }
}

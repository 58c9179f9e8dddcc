//! Labels of `docs/metrics.md` against what a process exports: rules and panels choose by them.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use voxfleet_harness::find;

const PAGE: &str = "docs/metrics.md";

/// Labels of a metric, each with the values that are all there are; none: any.
type Labels = BTreeMap<String, Option<Vec<String>>>;

/// Every series of `text` has the labels of its row in this section (`## Dispatcher`), with values of its row.
pub(crate) fn labels_as_documented(text: &str, section: &str) -> Result<()> {
    let page = std::fs::read_to_string(find::root().join(PAGE))?;
    let rows = rows(&page, section)?;
    compare(text, &rows)
}

fn rows(page: &str, section: &str) -> Result<BTreeMap<String, Labels>> {
    let (_, part) = page.split_once(&format!("\n{section}\n")).with_context(|| format!("{PAGE}: {section}"))?;
    let part = part.split("\n## ").next().unwrap_or_default();
    let mut rows = BTreeMap::new();
    for line in part.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        ensure!(cells.len() == 5, "{PAGE}: {line}");
        rows.insert(cells[0].trim_matches('`').to_owned(), labels(cells[3]));
    }
    Ok(rows)
}

/// `` `kind` (total, free), `gpu_id` ``
fn labels(cell: &str) -> Labels {
    let mut labels = Labels::new();
    for (index, part) in cell.split('`').enumerate().filter(|(index, _)| index % 2 == 1) {
        let after = cell.split('`').nth(index + 1).unwrap_or_default().trim_start();
        let listed = after.strip_prefix('(').and_then(|rest| rest.split_once(')')).map(|(values, _)| values);
        let values = listed.map(|values| values.split(',').map(|value| value.trim().to_owned()).collect::<Vec<_>>());
        labels.insert(part.to_owned(), values.filter(|values| !values.iter().any(|value| value == "...")));
    }
    labels
}

fn compare(text: &str, rows: &BTreeMap<String, Labels>) -> Result<()> {
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (series, _) = line.rsplit_once(' ').context("a value")?;
        let (name, inner) = series.split_once('{').unwrap_or((series, ""));
        let wanted = rows.get(name).with_context(|| format!("{name} is not in {PAGE}"))?;
        let mut found = Vec::new();
        // No value of ours holds a quote or a comma.
        for pair in inner.trim_end_matches('}').split(',').filter(|pair| !pair.is_empty()) {
            let (label, value) = pair.split_once('=').with_context(|| line.to_owned())?;
            let values = wanted.get(label).with_context(|| format!("{PAGE}: {name} has no label {label}"))?;
            let value = value.trim_matches('"');
            let fits = values.as_ref().is_none_or(|values| values.iter().any(|listed| listed == value));
            ensure!(fits, "{PAGE}: {name}: {label} is never {value:?}, but {values:?}");
            found.push(label);
        }
        ensure!(found.len() == wanted.len(), "{series} has not the labels {:?}", wanted.keys());
    }
    Ok(())
}

#[test]
fn what_a_row_does_not_list_is_found() -> Result<()> {
    let page = "\n## D\n| name | | | | |\n| `a` | gauge | | `use` (x, y), `gpu_id` | |\n| `b` | counter | | `class` (p, ...) | |\n| `c` | gauge | | | |\n\n## W\n";
    let rows = rows(page, "## D")?;
    let fits = "# TYPE a gauge\na{use=\"x\",gpu_id=\"any\"} 1\nb{class=\"q\"} 2\nc 3\n";
    compare(fits, &rows)?;
    for wrong in [
        "a{use=\"z\",gpu_id=\"g\"} 1\n",
        "a{use=\"x\"} 1\n",
        "b{class=\"p\",more=\"x\"} 1\n",
        "c{x=\"y\"} 1\n",
        "d 1\n",
    ] {
        ensure!(compare(wrong, &rows).is_err(), "{wrong}");
    }
    Ok(())
}

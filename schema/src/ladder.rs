//! Sizes of Whisper that stand in for each other when one does not fit. Pure.
//!
//! A model's size is read from its name: `small.en`, `small-q5_1` and `ggml-small.en-q8_0` are all `small`. An English model
//! is only replaced by another one that knows English; one that knows many languages never by an English one.

/// Sizes, largest first.
const LADDER: [&str; 5] = ["large-v3-turbo", "medium", "small", "base", "tiny"];

/// The size at the top as it was first published; the ladder names what runs in its place.
const PLAIN_LARGE: &str = "large-v3";

/// Whether a name is that of a published size alone, no variant of one: those that a table of sizes lists.
pub fn is_plain_size(model: &str) -> bool {
    model == PLAIN_LARGE || LADDER[1..].contains(&model)
}

/// Place of a model on the ladder; none for names that say nothing of a size. Every `large` is at the top.
pub fn rung(model: &str) -> Option<usize> {
    let name = model.strip_prefix("ggml-").unwrap_or(model);
    let family = name.split(['.', '-', '_']).next()?;
    match family {
        "large" | "turbo" => Some(0),
        _ => LADDER.iter().position(|size| *size == family),
    }
}

/// Whether it knows English alone.
pub fn english_only(model: &str) -> bool {
    model.split(['-', '_']).any(|part| part.ends_with(".en") || part == "en")
}

/// Whether `other` may stand in for `model`: smaller, or the same size in fewer bytes is not enough, and of no fewer languages.
pub fn may_stand_in(other: &str, model: &str) -> bool {
    let languages = english_only(model) || !english_only(other);
    matches!((rung(model), rung(other)), (Some(asked), Some(offered)) if offered > asked) && languages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_sizes() {
        for (name, size) in [
            ("large-v3-turbo", Some(0)),
            ("large-v3", Some(0)),
            ("large-v2-q5_0", Some(0)),
            ("medium.en", Some(1)),
            ("ggml-small.en-q8_0", Some(2)),
            ("small-q5_1", Some(2)),
            ("base", Some(3)),
            ("tiny.en-q8_0", Some(4)),
            ("micro.en-q8_0", None),
            ("", None),
            ("basement", None),
        ] {
            assert_eq!(rung(name), size, "{name}");
        }
    }

    #[test]
    fn a_table_of_sizes_has_one_name_for_each() {
        let plain = ["large-v3", "medium", "small", "base", "tiny"];
        assert!(plain.into_iter().all(is_plain_size));
        assert_eq!(plain.map(rung), [Some(0), Some(1), Some(2), Some(3), Some(4)]);
        for variant in ["large-v3-turbo", "large-v2", "small.en", "base-q5_1", "ggml-tiny", ""] {
            assert!(!is_plain_size(variant), "{variant}");
        }
    }

    #[test]
    fn smaller_ones_stand_in_where_no_language_is_lost() {
        for (other, model, may) in [
            ("small", "medium", true),
            ("small.en", "medium.en", true),
            ("small", "medium.en", true),
            ("small.en", "medium", false),
            ("medium", "small", false),
            ("small-q5_1", "small", false),
            ("tiny", "large-v3", true),
            ("micro.en", "base.en", false),
        ] {
            assert_eq!(may_stand_in(other, model), may, "{other} for {model}");
        }
    }
}

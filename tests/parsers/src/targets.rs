//! The parsers, each with what must hold. A target answers whether the input was accepted, and panics where a promise is
//! broken.

mod browser;
mod documents;
mod sound;
mod text;
mod wire;

/// One parser.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub name: &'static str,
    /// Longest input that is tried.
    pub max_len: usize,
    /// Files and folders of the project with inputs to begin with.
    pub seeds: &'static [&'static str],
    pub run: fn(&[u8]) -> bool,
}

const GOLDEN: &str = "schema/tests/golden";

pub const TARGETS: &[Target] = &[
    Target { name: "json", max_len: 8_192, seeds: &[GOLDEN], run: wire::json },
    Target { name: "msgpack", max_len: 8_192, seeds: &[GOLDEN], run: wire::msgpack },
    Target { name: "requests", max_len: 70_000, seeds: &[GOLDEN], run: wire::requests },
    Target { name: "headers", max_len: 8_192, seeds: &[], run: wire::headers },
    Target { name: "options", max_len: 8_192, seeds: &[GOLDEN], run: wire::options },
    Target { name: "ids", max_len: 512, seeds: &[], run: text::ids },
    Target { name: "subjects", max_len: 512, seeds: &[], run: text::subjects },
    Target { name: "urls", max_len: 5_000, seeds: &[], run: text::urls },
    Target { name: "engine_frames", max_len: 16_384, seeds: &[GOLDEN], run: wire::engine_frames },
    Target { name: "decoder_frames", max_len: 16_384, seeds: &[], run: sound::frames },
    Target { name: "sniff", max_len: 2_048, seeds: &["audio/tests/fixtures"], run: sound::sniff },
    Target { name: "recordings", max_len: 32_768, seeds: &["audio/tests/fixtures"], run: sound::recordings },
    Target {
        name: "rttm",
        max_len: 4_096,
        seeds: &["tests/audio/call-01.rttm", "cli/tests/data/formats/transcript.rttm"],
        run: text::rttm,
    },
    Target { name: "uem", max_len: 4_096, seeds: &[], run: text::uem },
    Target { name: "words", max_len: 1_024, seeds: &["tests/audio/call-01.txt"], run: text::words },
    Target { name: "config", max_len: 16_384, seeds: &["voxfleet.example.toml"], run: documents::config },
    Target { name: "asr_query", max_len: 2_048, seeds: &[], run: browser::asr_query },
    Target { name: "job_form", max_len: 4_096, seeds: &[], run: browser::job_form },
    Target { name: "lists", max_len: 1_024, seeds: &[], run: browser::lists },
    Target { name: "pcm", max_len: 4_096, seeds: &["audio/tests/fixtures"], run: browser::pcm },
    Target { name: "door", max_len: 4_096, seeds: &[], run: browser::door },
    Target { name: "catalog", max_len: 32_768, seeds: &["store/models.toml"], run: documents::catalog },
];

//! Sizes of memory as people write them: `15GB`, `15360MB`, `9.6 GB`, `T4:15GB`. Pure.
//!
//! MB are 2^20 bytes and GB are 1024 of those, with or without the `i`: that is how NVIDIA's tools and data sheets count
//! a card (a T4 of "15 GB" says 15360 MiB), and how catalog and heartbeats count models.

use std::str::FromStr;

use serde::Deserialize;

/// More than any machine has; keeps sums of many of them far from overflow.
const MOST_MB: u64 = 1 << 30;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    #[error("{0:?} is not a size of memory: say 15GB or 15360MB")]
    NoSize(String),
    #[error("{0:?} is no card: say its name and its memory, as in T4:15GB")]
    NoCard(String),
    #[error("{0:?} is no tenant: say its name and its memory, as in voxtral=9.6GB")]
    NoTenant(String),
}

/// At least one MB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Size {
    pub mb: u64,
}

impl FromStr for Size {
    type Err = SizeError;
    fn from_str(text: &str) -> Result<Self, SizeError> {
        let wrong = || SizeError::NoSize(text.to_owned());
        let trimmed = text.trim();
        let at = trimmed.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(wrong)?;
        let (number, unit) = trimmed.split_at(at);
        let number = number.trim_end();
        let plain = number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        let number = number.parse::<f64>().ok().filter(|_| plain).ok_or_else(wrong)?;
        let scale = match unit.to_ascii_uppercase().as_str() {
            "MB" | "MIB" | "M" => 1.0,
            "GB" | "GIB" | "G" => 1024.0,
            "TB" | "TIB" | "T" => 1024.0 * 1024.0,
            _ => return Err(wrong()),
        };
        // Saturates; what is too large is refused in the next line.
        let mb = (number * scale).round() as u64;
        if (1..=MOST_MB).contains(&mb) { Ok(Self { mb }) } else { Err(wrong()) }
    }
}

impl TryFrom<String> for Size {
    type Error = SizeError;
    fn try_from(text: String) -> Result<Self, SizeError> {
        text.parse()
    }
}

/// A card that is described instead of looked at.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct GpuSpec {
    pub name: String,
    pub total_mb: u64,
}

impl FromStr for GpuSpec {
    type Err = SizeError;
    fn from_str(text: &str) -> Result<Self, SizeError> {
        let (name, size) = named(text, ':').ok_or_else(|| SizeError::NoCard(text.to_owned()))?;
        Ok(Self { name, total_mb: size.parse::<Size>()?.mb })
    }
}

impl TryFrom<String> for GpuSpec {
    type Error = SizeError;
    fn try_from(text: String) -> Result<Self, SizeError> {
        text.parse()
    }
}

/// Whoever else has memory on a card.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Tenant {
    pub name: String,
    pub mb: u64,
}

impl FromStr for Tenant {
    type Err = SizeError;
    fn from_str(text: &str) -> Result<Self, SizeError> {
        let (name, size) = named(text, '=').ok_or_else(|| SizeError::NoTenant(text.to_owned()))?;
        Ok(Self { name, mb: size.parse::<Size>()?.mb })
    }
}

/// Both sides of the last `sign`, where there is a name in front of it.
fn named(text: &str, sign: char) -> Option<(String, &str)> {
    let (name, size) = text.rsplit_once(sign)?;
    let name = name.trim();
    (!name.is_empty() && !name.contains(char::is_control)).then(|| (name.to_owned(), size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_cards_are_sold() {
        for (text, mb) in [
            ("15GB", Some(15_360)),
            ("15360MB", Some(15_360)),
            ("16GiB", Some(16_384)),
            ("9.6GB", Some(9_830)),
            (" 9.6 gb ", Some(9_830)),
            ("80G", Some(81_920)),
            ("512m", Some(512)),
            ("1TB", Some(1 << 20)),
            ("15", None),
            ("", None),
            ("GB", None),
            ("0GB", None),
            ("-1GB", None),
            ("1e3GB", None),
            ("infGB", None),
            ("nanGB", None),
            ("1.2.3GB", None),
            ("15 G B", None),
            ("15kB", None),
            ("99999999TB", None),
        ] {
            assert_eq!(text.parse::<Size>().ok().map(|s| s.mb), mb, "{text:?}");
        }
    }

    #[test]
    fn cards_and_tenants_have_names() {
        assert_eq!("T4:15GB".parse(), Ok(GpuSpec { name: "T4".to_owned(), total_mb: 15_360 }));
        assert_eq!("NVIDIA: L4:24GB".parse::<GpuSpec>().map(|g| g.name), Ok("NVIDIA: L4".to_owned()));
        assert_eq!("voxtral=9.6GB".parse(), Ok(Tenant { name: "voxtral".to_owned(), mb: 9_830 }));
        for text in ["15GB", ":15GB", "T4=15GB", ""] {
            assert_eq!(text.parse::<GpuSpec>(), Err(SizeError::NoCard(text.to_owned())));
        }
        assert_eq!("T4:".parse::<GpuSpec>(), Err(SizeError::NoSize(String::new())));
        assert_eq!("voxtral".parse::<Tenant>(), Err(SizeError::NoTenant("voxtral".to_owned())));
        assert_eq!("voxtral=9.6".parse::<Tenant>(), Err(SizeError::NoSize("9.6".to_owned())));
    }
}

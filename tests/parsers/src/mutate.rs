//! Changes to inputs. The same seed makes the same changes.

/// splitmix64.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`, which is above nought.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// What breaks parsers: limits of numbers, of text, of containers.
const WORDS: [&[u8]; 46] = [
    b"0",
    b"-1",
    b"-0",
    b"1e308",
    b"-1e300",
    b"1e-400",
    b"NaN",
    b"inf",
    b"255",
    b"256",
    b"65535",
    b"65536",
    b"2147483648",
    b"4294967295",
    b"4294967296",
    b"9223372036854775807",
    b"9223372036854775808",
    b"18446744073709551615",
    b"18446744073709551616",
    b"0.1",
    b"null",
    b"true",
    b"false",
    b"[]",
    b"{}",
    b"\"\"",
    b"\\u0000",
    b"\\ud800",
    b"\xc3\x28",
    "\u{feff}".as_bytes(),
    "\u{202e}".as_bytes(),
    "\u{10ffff}".as_bytes(),
    b"unknown",
    b"..",
    b"/",
    b"*",
    b">",
    b".",
    b"@",
    b"%00",
    b"[::ffff:127.0.0.1]",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x00",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdd\x7f\xff\xff\xff",
];
const BYTES: [u8; 12] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'{', b'[', b',', b':', b'\n', b' '];

/// A changed copy of one of the pool's inputs, at most `max` long.
pub(crate) fn mutant(pool: &[Vec<u8>], dice: &mut Dice, max: usize) -> Vec<u8> {
    let mut bytes = pool[dice.below(pool.len())].clone();
    // Mostly one change: two rarely both leave an input that is read far.
    let changes = 1 + dice.below(8) / 5 * (1 + dice.below(4));
    for _ in 0..changes {
        change(&mut bytes, pool, dice);
    }
    bytes.truncate(max);
    bytes
}

fn change(bytes: &mut Vec<u8>, pool: &[Vec<u8>], dice: &mut Dice) {
    let at = dice.below(bytes.len() + 1);
    let most = [4, 32, bytes.len() + 1][dice.below(3)];
    let len = 1 + dice.below(most);
    let to = (at + len).min(bytes.len());
    match dice.below(11) {
        0 => flip(bytes, at, 1 << dice.below(8)),
        1 => set(bytes, at, BYTES[dice.below(BYTES.len())]),
        2 => set(bytes, at, dice.next() as u8),
        3 => drop(bytes.drain(at..to)),
        4 => bytes.truncate(at),
        5 => insert(bytes, at, WORDS[dice.below(WORDS.len())]),
        6 => replace_number(bytes, at, WORDS[dice.below(20)]),
        7 => {
            let copy = bytes[at..to].to_vec();
            insert(bytes, dice.below(bytes.len() + 1), &copy);
        }
        8 => {
            // Nests and lists without end.
            let copy = bytes[at..to.min(at + 16)].to_vec();
            insert(bytes, at, &copy.repeat(1 + dice.below(400)));
        }
        9 => {
            let other = &pool[dice.below(pool.len())];
            let from = dice.below(other.len() + 1);
            let until = (from + len).min(other.len());
            insert(bytes, at, &other[from..until]);
        }
        _ => {
            // A length somewhere in a binary format.
            let value = [0u32, 1, 0x7fff_ffff, 0xffff_ffff, bytes.len() as u32][dice.below(5)];
            let value = if dice.below(2) == 0 { value.to_le_bytes() } else { value.to_be_bytes() };
            value.into_iter().enumerate().for_each(|(n, byte)| set(bytes, at + n, byte));
        }
    }
}

fn flip(bytes: &mut [u8], at: usize, bit: u8) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= bit;
    }
}

fn set(bytes: &mut [u8], at: usize, value: u8) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte = value;
    }
}

fn insert(bytes: &mut Vec<u8>, at: usize, what: &[u8]) {
    bytes.splice(at..at, what.iter().copied());
}

/// The next number in a text becomes another one.
fn replace_number(bytes: &mut Vec<u8>, at: usize, with: &[u8]) {
    let is_digit = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b'.' | b'-');
    let Some(from) = bytes[at..].iter().position(|b| b.is_ascii_digit()).map(|n| at + n) else { return };
    let to = bytes[from..].iter().position(|b| !is_digit(b)).map_or(bytes.len(), |n| from + n);
    bytes.splice(from..to, with.iter().copied());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_changes_and_another_one_others() {
        let pool = vec![br#"{"a":12,"b":[1,2]}"#.to_vec(), Vec::new(), vec![0; 300]];
        let made = |seed| {
            let mut dice = Dice::new(seed);
            (0..500).map(|_| mutant(&pool, &mut dice, 1_000)).collect::<Vec<_>>()
        };
        assert_eq!(made(1), made(1));
        assert_ne!(made(1), made(2));
        assert!(made(3).iter().all(|bytes| bytes.len() <= 1_000));
        let distinct: std::collections::HashSet<_> = made(4).into_iter().collect();
        assert!(distinct.len() > 300, "{} of 500 are different", distinct.len());
    }
}

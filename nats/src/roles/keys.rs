//! Keys by which users prove who they are: the server knows the public half, the other half never leaves its file.

use nkeys::KeyPair;

use crate::config::Secret;

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("cannot make a key")]
    Make(#[source] nkeys::error::Error),
    #[error("not the seed of a user's key (SU...)")]
    NotASeed,
}

/// A user's new key.
#[derive(Debug)]
pub struct UserKey {
    /// `U...`, for the server's configuration. No secret.
    pub public: String,
    /// `SU...`, what `nats.nkey_seed_file` holds.
    pub seed: Secret,
}

/// Makes one from the system's random numbers.
pub fn make() -> Result<UserKey, KeyError> {
    let pair = KeyPair::new_user();
    Ok(UserKey { public: pair.public_key(), seed: Secret::new(pair.seed().map_err(KeyError::Make)?) })
}

/// The public half of a seed, which may have white space around it.
pub fn public_of(seed: &str) -> Result<String, KeyError> {
    let seed = seed.trim();
    // The library's own error may repeat what it could not read.
    let pair = KeyPair::from_seed(seed).map_err(|_| KeyError::NotASeed)?;
    if seed.starts_with("SU") { Ok(pair.public_key()) } else { Err(KeyError::NotASeed) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_key_reads_back_and_does_not_print_its_seed() {
        let (a, b) = (make().expect("a key"), make().expect("a key"));
        assert_ne!(a.public, b.public);
        assert!(a.public.starts_with('U') && a.seed.reveal().starts_with("SU"));
        assert_eq!(public_of(&format!("{}\n", a.seed.reveal())).expect("reads"), a.public);
        assert!(!format!("{a:?}").contains(a.seed.reveal()));
    }

    #[test]
    fn what_is_no_seed_is_not_repeated() {
        let account = KeyPair::new_account().seed().expect("a seed");
        for bad in ["", "hunter2", account.as_str(), "SUAAAA"] {
            let error = public_of(bad).expect_err("refused");
            assert!(bad.is_empty() || !format!("{error} {error:?}").contains(bad), "{bad}");
        }
    }
}

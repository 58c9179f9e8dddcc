//! Names what a file is that is no recording, so its sender learns more than "cannot decode".

/// Bytes looked at.
pub(crate) const HEAD_BYTES: usize = 1024;

/// What the file is, if it is known not to be a recording that can be decoded. Asked before any decoder sees it: scanning
/// for audio in the middle of a picture finds some.
pub(crate) fn foreign(head: &[u8]) -> Option<&'static str> {
    let at = |from: usize, mark: &[u8]| head.get(from..from + mark.len()) == Some(mark);
    let known: [(usize, &[u8], &'static str); 27] = [
        (0, b"%PDF", "a PDF document"),
        (0, b"PK\x03\x04", "a zip archive (or an office document)"),
        (0, b"\x1f\x8b", "gzip-compressed data; send what is inside"),
        (0, b"BZh", "bzip2-compressed data; send what is inside"),
        (0, b"\xfd7zXZ\0", "xz-compressed data; send what is inside"),
        (0, b"\x28\xb5\x2f\xfd", "zstd-compressed data; send what is inside"),
        (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (0, b"Rar!", "a rar archive"),
        (257, b"ustar", "a tar archive; send what is inside"),
        (0, b"\x89PNG", "a PNG picture"),
        (0, b"\xff\xd8\xff", "a JPEG picture"),
        (0, b"GIF8", "a GIF picture"),
        (8, b"WEBP", "a WebP picture"),
        (8, b"AVI ", "an AVI video"),
        (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows Media (wma, wmv, asf)"),
        (0, b"FLV\x01", "a Flash video"),
        (0, b"\0\0\x01\xba", "an MPEG video (program stream)"),
        (0, b"\0\0\x01\xb3", "an MPEG video"),
        (0, b"#!AMR", "AMR audio"),
        (0, b"MThd", "a MIDI file: notes, not sound"),
        (0, b"FORM", "an AIFF file"),
        (0, b"caff", "a Core Audio file (caf)"),
        (0, b".snd", "a Sun audio file (au)"),
        (0, b"wvpk", "WavPack audio"),
        (0, b"MAC ", "Monkey's Audio"),
        (0, b"\x7fELF", "a program"),
        (0, b"SQLite format 3", "a database"),
    ];
    if let Some((_, _, what)) = known.iter().find(|(from, mark, _)| at(*from, mark)) {
        return Some(what);
    }
    // Packets of 188 bytes, each with its sync byte.
    if head.len() > 3 * 188 && [0, 188, 376, 564].iter().all(|&from| head[from] == 0x47) {
        return Some("an MPEG transport stream (television, HLS segments)");
    }
    text(head)
}

fn text(head: &[u8]) -> Option<&'static str> {
    let printable = |&b: &u8| matches!(b, b'\t' | b'\n' | b'\r' | 0x20..=0x7e) || b >= 0x80;
    // A cut may fall inside a character; that and a byte order mark are no reason to doubt.
    let valid = match std::str::from_utf8(head) {
        Ok(_) => true,
        Err(error) => error.error_len().is_none(),
    };
    if head.len() < 16 || !valid || !head.iter().all(printable) {
        return None;
    }
    let start = String::from_utf8_lossy(head).trim_start_matches('\u{feff}').trim_start().to_ascii_lowercase();
    Some(if start.starts_with("<!doctype html") || start.starts_with("<html") {
        "a web page (often a login or error page in place of the file)"
    } else if start.starts_with('<') {
        "an XML text (often an error message in place of the file)"
    } else if start.starts_with(['{', '[']) {
        "a JSON text (often an error message in place of the file)"
    } else {
        "a text"
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_recording_is_named() {
        let mut tar = vec![0; 512];
        tar[257..262].copy_from_slice(b"ustar");
        let ts: Vec<u8> = (0..1024).map(|i| if i % 188 == 0 { 0x47 } else { 0xaa }).collect();
        let cases: [(&[u8], &str); 9] = [
            (b"<!DOCTYPE html><html><body>sign in</body>", "web page"),
            (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied", "XML"),
            (b"{\"error\": \"not found\", \"code\": 404}", "JSON"),
            ("Grüße, this is a transcript of the call".as_bytes(), "a text"),
            (b"\xff\xd8\xff\xe0\0\x10JFIF", "JPEG"),
            (b"RIFF\0\0\0\0AVI LIST", "AVI"),
            (b"\0\0\x01\xba\x44", "MPEG video"),
            (&tar, "tar"),
            (&ts, "transport stream"),
        ];
        for (head, what) in cases {
            let named = foreign(head).unwrap_or("nothing");
            assert!(named.contains(what), "{what}: {named}");
        }
    }

    #[test]
    fn recordings_are_left_alone() {
        for head in
            [&b"RIFF\x24\0\0\0WAVEfmt "[..], b"fLaC\0\0\0\x22", b"OggS\0\x02", b"\0\0\0\x20ftypM4A ", b"ID3\x04", b""]
        {
            assert_eq!(foreign(head), None);
        }
    }
}

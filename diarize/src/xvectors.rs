//! Files of the x-vector world, from their bytes: Kaldi's archives of vectors and its PLDA, the transform that HDF5 keeps
//! beside them, and turns from embeddings whose windows overlap.
//!
//! What is read here are files that somebody hands to a measurement, so a broken one is an error and never a panic. Of
//! HDF5 only what h5py writes by default is understood: one group, contiguous little-endian doubles.

use std::collections::BTreeMap;

use crate::cluster::vbx::Plda;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XvectorError {
    #[error("{what} breaks off or is not what it should be at byte {at}")]
    Malformed { what: &'static str, at: usize },
    #[error("{0} is missing or has the wrong shape")]
    Shape(&'static str),
}

/// Bytes with a place in them.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    what: &'static str,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8], at: usize, what: &'static str) -> Self {
        Self { bytes, at, what }
    }

    fn malformed(&self) -> XvectorError {
        XvectorError::Malformed { what: self.what, at: self.at }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], XvectorError> {
        let end = self.at.checked_add(count).ok_or_else(|| self.malformed())?;
        let taken = self.bytes.get(self.at..end).ok_or_else(|| self.malformed())?;
        self.at = end;
        Ok(taken)
    }

    fn expect(&mut self, text: &[u8]) -> Result<(), XvectorError> {
        let at = self.at;
        if self.take(text.len())? == text { Ok(()) } else { Err(XvectorError::Malformed { what: self.what, at }) }
    }

    /// Little-endian, of 1, 2, 4 or 8 bytes.
    fn number(&mut self, bytes: usize) -> Result<u64, XvectorError> {
        Ok(self.take(bytes)?.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn place(&mut self) -> Result<usize, XvectorError> {
        let place = self.number(8)?;
        usize::try_from(place).map_err(|_| self.malformed())
    }

    fn count(&mut self) -> Result<usize, XvectorError> {
        // Kaldi says the size of a number before it.
        self.expect(&[4])?;
        Ok(self.number(4)? as usize)
    }

    fn doubles(&mut self, count: usize) -> Result<Vec<f64>, XvectorError> {
        let bytes = self.take(count.checked_mul(8).ok_or_else(|| self.malformed())?)?;
        let double = |b: &[u8]| <[u8; 8]>::try_from(b).map(f64::from_le_bytes).unwrap_or(0.0);
        Ok(bytes.chunks_exact(8).map(double).collect())
    }

    fn floats(&mut self, count: usize) -> Result<Vec<f64>, XvectorError> {
        let bytes = self.take(count.checked_mul(4).ok_or_else(|| self.malformed())?)?;
        let float = |b: &[u8]| <[u8; 4]>::try_from(b).map(f32::from_le_bytes).unwrap_or(0.0);
        Ok(bytes.chunks_exact(4).map(|b| f64::from(float(b))).collect())
    }
}

/// The vectors of a binary Kaldi archive with their names, in order.
pub fn archive(bytes: &[u8]) -> Result<Vec<(String, Vec<f64>)>, XvectorError> {
    let mut reader = Reader::new(bytes, 0, "archive");
    let mut vectors = Vec::new();
    while reader.at < bytes.len() {
        let length = bytes[reader.at..].iter().position(|b| *b == b' ').ok_or_else(|| reader.malformed())?;
        let name = String::from_utf8_lossy(reader.take(length)?).trim_start().to_owned();
        reader.expect(b" \0B")?;
        vectors.push((name, vector(&mut reader)?));
    }
    Ok(vectors)
}

/// A vector of either precision.
fn vector(reader: &mut Reader<'_>) -> Result<Vec<f64>, XvectorError> {
    match reader.take(3)? {
        b"FV " => {
            let count = reader.count()?;
            reader.floats(count)
        }
        b"DV " => {
            let count = reader.count()?;
            reader.doubles(count)
        }
        _ => Err(reader.malformed()),
    }
}

/// A binary Kaldi PLDA model.
pub fn plda(bytes: &[u8]) -> Result<Plda, XvectorError> {
    let mut reader = Reader::new(bytes, 0, "PLDA");
    reader.expect(b"\0B<Plda> ")?;
    let mean = vector(&mut reader)?;
    reader.expect(b"DM ")?;
    let (rows, columns) = (reader.count()?, reader.count()?);
    let values = rows.checked_mul(columns).ok_or_else(|| reader.malformed())?;
    let transform = reader.doubles(values)?;
    let psi = vector(&mut reader)?;
    reader.expect(b"</Plda> ")?;
    if columns != mean.len() || rows != psi.len() || mean.is_empty() {
        return Err(XvectorError::Shape("PLDA"));
    }
    Ok(Plda { mean, transform, psi })
}

/// What stands between an x-vector and the PLDA model: centred, made of length 1, reduced, centred, made of length 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Transform {
    first_mean: Vec<f64>,
    /// A row for each dimension of the x-vector.
    reduction: Vec<f64>,
    second_mean: Vec<f64>,
}

impl Transform {
    /// From an HDF5 file with `mean1`, `lda` and `mean2`.
    pub fn from_hdf5(bytes: &[u8]) -> Result<Self, XvectorError> {
        let mut sets = datasets(bytes)?;
        let mut set = |name: &'static str| sets.remove(name).ok_or(XvectorError::Shape(name));
        let transform = Self { first_mean: set("mean1")?, reduction: set("lda")?, second_mean: set("mean2")? };
        let expected = transform.first_mean.len() * transform.second_mean.len();
        if expected == 0 || transform.reduction.len() != expected {
            return Err(XvectorError::Shape("lda"));
        }
        Ok(transform)
    }

    /// An x-vector as the PLDA model wants it.
    pub fn apply(&self, vector: &[f64]) -> Vec<f64> {
        let mut centred: Vec<f64> = vector.iter().zip(&self.first_mean).map(|(x, m)| x - m).collect();
        unit(&mut centred);
        let mut reduced: Vec<f64> = self.second_mean.iter().map(|m| -m).collect();
        for (row, x) in self.reduction.chunks_exact(self.second_mean.len()).zip(&centred) {
            reduced.iter_mut().zip(row).for_each(|(sum, weight)| *sum += weight * x);
        }
        unit(&mut reduced);
        reduced
    }
}

fn unit(vector: &mut [f64]) {
    let length = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|x| *x /= length);
    }
}

/// The datasets of an HDF5 file's root group (superblock of version 0).
fn datasets(bytes: &[u8]) -> Result<BTreeMap<String, Vec<f64>>, XvectorError> {
    let reader = |at: usize| Reader::new(bytes, at, "HDF5");
    reader(0).expect(b"\x89HDF\r\n\x1a\n\0")?;
    // The root group's symbol table entry ends with the places of its tree and its names.
    let mut root = reader(56 + 24);
    let (tree, heap) = (root.place()?, root.place()?);
    let mut heap = reader(heap);
    heap.expect(b"HEAP")?;
    heap.take(20)?;
    let names = heap.place()?;
    let mut node = reader(tree);
    node.expect(b"TREE\0\0")?;
    let leaves = node.number(2)?;
    node.take(16)?;
    let mut sets = BTreeMap::new();
    for _ in 0..leaves {
        node.take(8)?;
        let mut leaf = reader(node.place()?);
        leaf.expect(b"SNOD")?;
        leaf.take(2)?;
        for _ in 0..leaf.number(2)? {
            let (name, header) = (leaf.place()?, leaf.place()?);
            leaf.take(24)?;
            let mut text = reader(names.saturating_add(name));
            let mut label = Vec::new();
            while let [byte] = text.take(1)?
                && *byte != 0
            {
                label.push(*byte);
            }
            sets.insert(String::from_utf8_lossy(&label).into_owned(), dataset(bytes, header)?);
        }
    }
    Ok(sets)
}

const DATATYPE: u64 = 3;
const LAYOUT: u64 = 8;

/// The values of one dataset, row after row.
fn dataset(bytes: &[u8], header: usize) -> Result<Vec<f64>, XvectorError> {
    let mut reader = Reader::new(bytes, header, "HDF5 dataset");
    reader.expect(&[1, 0])?;
    let messages = reader.number(2)?;
    reader.take(12)?;
    let mut doubles = false;
    let mut values = None;
    for _ in 0..messages {
        let (kind, size) = (reader.number(2)?, reader.number(2)? as usize);
        reader.take(4)?;
        let mut body = Reader::new(bytes, reader.at, "HDF5 dataset");
        match kind {
            // Floating point, little-endian, of eight bytes.
            DATATYPE => doubles = body.number(1)? & 15 == 1 && body.number(1)? & 1 == 0 && body.take(6)?[2] == 8,
            LAYOUT => {
                // Version 3, contiguous.
                body.expect(&[3, 1])?;
                let (place, length) = (body.place()?, body.place()?);
                values = Some(Reader::new(bytes, place, "HDF5 dataset").doubles(length / 8)?);
            }
            _ => {}
        }
        reader.take(size)?;
        if values.is_some() && doubles {
            break;
        }
    }
    values.filter(|_| doubles).ok_or_else(|| reader.malformed())
}

/// Turns from embeddings whose windows (start, end) overlap: where two speakers meet, the overlap is shared in the
/// middle; where windows do not touch, a turn ends.
pub fn turns(windows: &[(f64, f64)], speakers: &[usize]) -> Vec<(f64, f64, usize)> {
    let mut turns: Vec<(f64, f64, usize)> = Vec::new();
    for ((start, end), speaker) in windows.iter().zip(speakers) {
        let mut from = *start;
        if let Some(last) = turns.last_mut()
            && last.1 >= from - 1e-6
        {
            if last.2 == *speaker {
                last.1 = *end;
                continue;
            }
            from = (from + last.1) / 2.0;
            last.1 = from;
        }
        turns.push((from, *end, *speaker));
    }
    turns
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kaldi_vector(values: &[f64]) -> Vec<u8> {
        let mut bytes = b"DV \x04".to_vec();
        bytes.extend((values.len() as u32).to_le_bytes());
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        bytes
    }

    #[test]
    fn archives_hold_vectors_of_both_precisions() {
        let mut bytes = b"one \0BFV \x04\x02\0\0\0".to_vec();
        bytes.extend([1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend(b"two \0B");
        bytes.extend(kaldi_vector(&[0.25]));
        assert_eq!(archive(&bytes).unwrap(), [("one".into(), vec![1.5, -2.0]), ("two".into(), vec![0.25])]);
        for cut in 1..bytes.len() {
            let whole = cut == 22;
            assert_eq!(archive(&bytes[..cut]).is_ok(), whole, "cut at {cut}");
        }
        assert!(archive(b"name \0BXX \x04\x01\0\0\0abcd").is_err());
    }

    #[test]
    fn a_plda_model_is_read_and_projects() {
        let mut bytes = b"\0B<Plda> ".to_vec();
        bytes.extend(kaldi_vector(&[1.0, 2.0]));
        bytes.extend(b"DM \x04\x02\0\0\0\x04\x02\0\0\0");
        bytes.extend([1.0f64, 1.0, 0.0, 3.0].iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend(kaldi_vector(&[5.0, 0.5]));
        bytes.extend(b"</Plda> ");
        let model = plda(&bytes).unwrap();
        assert_eq!(model.project(&[2.0, 4.0], 2), [3.0, 6.0]);
        assert_eq!(model.project(&[2.0, 4.0], 1), [3.0]);
        assert!((1..bytes.len()).all(|cut| plda(&bytes[..cut]).is_err()));
    }

    #[test]
    fn what_is_no_hdf5_is_refused() {
        assert!(Transform::from_hdf5(b"").is_err());
        let mut pretender = b"\x89HDF\r\n\x1a\n\0".to_vec();
        pretender.resize(4_000, 0xff);
        assert!(Transform::from_hdf5(&pretender).is_err());
    }

    #[test]
    fn speakers_meet_in_the_middle_of_the_overlap() {
        let windows = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (6.0, 8.0)];
        assert_eq!(turns(&windows, &[0, 0, 1, 1]), [(0.0, 2.5, 0), (2.5, 4.0, 1), (6.0, 8.0, 1)]);
        assert_eq!(turns(&windows, &[0; 4]), [(0.0, 4.0, 0), (6.0, 8.0, 0)]);
    }
}

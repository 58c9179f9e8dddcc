//! VBx: a Bayesian HMM over embeddings that come one after another.
//!
//! After Landini, Profant, Diez, Burget, "Bayesian HMM clustering of x-vector sequences (VBx) in speaker diarization:
//! theory, implementation and analysis on standard tasks" (Computer Speech & Language 71, 2022; arXiv 2012.14952); the
//! numbers of equations are those of the paper. Each speaker is a state; its mean is drawn from the PLDA model's spread
//! between speakers, and what is heard of it spreads around that by the spread within. Speakers that the sequence does
//! not need lose their prior and are gone: their number need not be known, but the clustering it begins with must not
//! have too few.

use super::in_order;

/// Probabilistic linear discriminant analysis, as Kaldi stores it: `transform (x - mean)` has unit covariance within a
/// speaker and the diagonal covariance `psi` between speakers.
#[derive(Debug, Clone, PartialEq)]
pub struct Plda {
    pub mean: Vec<f64>,
    /// Row after row.
    pub transform: Vec<f64>,
    /// Largest first.
    pub psi: Vec<f64>,
}

impl Plda {
    /// An embedding where speakers spread by `psi`, in its first `dims` dimensions.
    pub fn project(&self, vector: &[f64], dims: usize) -> Vec<f64> {
        let centred: Vec<f64> = vector.iter().zip(&self.mean).map(|(x, m)| x - m).collect();
        self.transform
            .chunks_exact(self.mean.len())
            .take(dims)
            .map(|row| row.iter().zip(&centred).map(|(a, x)| a * x).sum())
            .collect()
    }
}

/// The scaling factors and priors of the paper's section 3.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Vbx {
    /// Scales the evidence: embeddings that overlap in time are not independent.
    pub acoustic: f64,
    /// Scales the speakers' prior: higher means fewer of them.
    pub speakers: f64,
    /// Probability that the next embedding is of the same speaker.
    pub loop_probability: f64,
    /// How sure the clustering it begins with is: the softmax's factor.
    pub smoothing: f64,
    pub iterations: usize,
    /// Stop when the evidence's lower bound gains less.
    pub least_gain: f64,
}

impl Default for Vbx {
    fn default() -> Self {
        Self { acoustic: 0.3, speakers: 17.0, loop_probability: 0.99, smoothing: 5.0, iterations: 40, least_gain: 1e-4 }
    }
}

/// The speaker of each embedding (all projected by one [`Plda`]), numbered from 0 in order of first showing; `begin` is
/// the clustering to begin with, numbered from 0.
pub fn refine(embeddings: &[Vec<f64>], psi: &[f64], begin: &[usize], vbx: &Vbx) -> Vec<usize> {
    let states = begin.iter().max().map_or(0, |last| last + 1);
    if embeddings.is_empty() || states == 0 {
        return Vec::new();
    }
    let mut model = Model::new(embeddings, psi, begin, states, vbx);
    let mut before = f64::NEG_INFINITY;
    for _ in 0..vbx.iterations {
        let bound = model.iterate(vbx);
        if bound - before < vbx.least_gain {
            break;
        }
        before = bound;
    }
    in_order(&model.responsibilities.iter().map(|row| highest(row)).collect::<Vec<_>>())
}

fn highest(row: &[f64]) -> usize {
    (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

struct Model<'a> {
    psi: &'a [f64],
    /// `V' x`, with `V` the root of psi (eq. 9).
    rho: Vec<Vec<f64>>,
    /// The part of an embedding's log-likelihood that no speaker changes.
    constant: Vec<f64>,
    /// Prior of each speaker.
    priors: Vec<f64>,
    /// How much each embedding belongs to each speaker: the paper's gamma.
    responsibilities: Vec<Vec<f64>>,
}

impl<'a> Model<'a> {
    fn new(embeddings: &[Vec<f64>], psi: &'a [f64], begin: &[usize], states: usize, vbx: &Vbx) -> Self {
        let roots: Vec<f64> = psi.iter().map(|p| p.sqrt()).collect();
        let rho = embeddings.iter().map(|e| e.iter().zip(&roots).map(|(x, r)| x * r).collect()).collect();
        let constant = embeddings
            .iter()
            .map(|e| -0.5 * (e.iter().map(|x| x * x).sum::<f64>() + e.len() as f64 * (2.0 * std::f64::consts::PI).ln()))
            .collect();
        let (sure, rest) = (vbx.smoothing.exp(), 1.0);
        let all = sure + (states - 1) as f64 * rest;
        let responsibilities = begin
            .iter()
            .map(|own| (0..states).map(|state| if state == *own { sure / all } else { rest / all }).collect())
            .collect();
        Self { psi, rho, constant, priors: vec![1.0 / states as f64; states], responsibilities }
    }

    /// One round of updates; the lower bound of the evidence (eq. 25).
    fn iterate(&mut self, vbx: &Vbx) -> f64 {
        let ratio = vbx.acoustic / vbx.speakers;
        let dims = self.psi.len();
        let states = self.priors.len();
        let mut likelihood = vec![vec![0f64; states]; self.rho.len()];
        let mut bound = 0.0;
        for state in 0..states {
            let mut occupied = 0.0;
            let mut sum = vec![0f64; dims];
            for (row, rho) in self.responsibilities.iter().zip(&self.rho) {
                occupied += row[state];
                sum.iter_mut().zip(rho).for_each(|(s, r)| *s += row[state] * r);
            }
            // Posterior of the speaker's mean: variance (eq. 17) and mean (eq. 16).
            let variance: Vec<f64> = self.psi.iter().map(|p| 1.0 / (1.0 + ratio * occupied * p)).collect();
            let mean: Vec<f64> = variance.iter().zip(&sum).map(|(v, s)| ratio * v * s).collect();
            let spread: f64 = variance.iter().zip(&mean).zip(self.psi).map(|((v, m), p)| (v + m * m) * p).sum();
            for ((row, rho), constant) in likelihood.iter_mut().zip(&self.rho).zip(&self.constant) {
                let agreement: f64 = rho.iter().zip(&mean).map(|(r, m)| r * m).sum();
                // Eq. 23, scaled.
                row[state] = vbx.acoustic * (agreement - 0.5 * spread + constant);
            }
            bound +=
                0.5 * vbx.speakers * variance.iter().zip(&mean).map(|(v, m)| v.ln() - v - m * m + 1.0).sum::<f64>();
        }
        bound + self.pass(&likelihood, vbx.loop_probability)
    }

    /// Forward and backward through the HMM in the logarithm: new responsibilities and priors; the log-likelihood.
    fn pass(&mut self, likelihood: &[Vec<f64>], stay: f64) -> f64 {
        let states = self.priors.len();
        let steps = likelihood.len();
        let priors: Vec<f64> = self.priors.iter().map(|p| p.ln()).collect();
        let (stay_ln, leave_ln) = (stay.ln(), (1.0 - stay).ln());
        // From any speaker to any by the priors, and from each to itself besides.
        let mut forward = vec![vec![0f64; states]; steps];
        let mut all = vec![0f64; steps];
        for step in 0..steps {
            for state in 0..states {
                let come = match step {
                    0 => priors[state],
                    _ => ln_add(forward[step - 1][state] + stay_ln, all[step - 1] + leave_ln + priors[state]),
                };
                forward[step][state] = come + likelihood[step][state];
            }
            all[step] = ln_sum(&forward[step]);
        }
        let mut backward = vec![vec![0f64; states]; steps];
        for step in (0..steps - 1).rev() {
            let ahead: Vec<f64> = (0..states).map(|s| likelihood[step + 1][s] + backward[step + 1][s]).collect();
            let leave = leave_ln + ln_sum(&ahead.iter().zip(&priors).map(|(a, p)| a + p).collect::<Vec<_>>());
            for state in 0..states {
                backward[step][state] = ln_add(ahead[state] + stay_ln, leave);
            }
        }
        let total = all[steps - 1];
        for step in 0..steps {
            for state in 0..states {
                self.responsibilities[step][state] = (forward[step][state] + backward[step][state] - total).exp();
            }
        }
        // Eq. 24: how often each speaker is entered.
        let entered: Vec<f64> = (0..states)
            .map(|state| {
                let later: f64 = (1..steps)
                    .map(|t| {
                        (all[t - 1] + likelihood[t][state] + backward[t][state] - total + leave_ln + priors[state])
                            .exp()
                    })
                    .sum();
                self.responsibilities[0][state] + later
            })
            .collect();
        let sum: f64 = entered.iter().sum();
        self.priors = entered.iter().map(|e| e / sum).collect();
        total
    }
}

fn ln_add(a: f64, b: f64) -> f64 {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if high == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

fn ln_sum(values: &[f64]) -> f64 {
    let highest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if highest == f64::NEG_INFINITY {
        return highest;
    }
    highest + values.iter().map(|v| (v - highest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look drawn from a normal distribution.
    struct Normal(u64);

    impl Normal {
        fn draw(&mut self) -> f64 {
            (0..12)
                .map(|_| {
                    self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (self.0 >> 11) as f64 / (1u64 << 53) as f64
                })
                .sum::<f64>()
                - 6.0
        }
    }

    const PSI: [f64; 6] = [9.0, 8.0, 7.0, 6.0, 3.0, 1.0];

    /// Embeddings of people who take turns, as PLDA says they are.
    fn talk(normal: &mut Normal, turns: &[(usize, usize)]) -> (Vec<Vec<f64>>, Vec<usize>) {
        // On either side of the mean in each dimension, no two on the same sides.
        let side = |who: usize, dim: usize| if (who >> (dim % 2)) & 1 == 1 { 2.0 } else { -2.0 };
        let person = |who: usize| PSI.iter().enumerate().map(|(dim, psi)| side(who, dim) * psi.sqrt()).collect();
        let people: Vec<Vec<f64>> = (0..4).map(person).collect();
        let order: Vec<usize> = turns.iter().flat_map(|(who, count)| std::iter::repeat_n(*who, *count)).collect();
        let embeddings = order.iter().map(|who| people[*who].iter().map(|m| m + normal.draw()).collect()).collect();
        (embeddings, in_order(&order))
    }

    #[test]
    fn too_many_speakers_become_as_many_as_there_are() {
        let turns = [(0, 30), (1, 25), (0, 10), (2, 30), (1, 20), (2, 15), (0, 20)];
        for seed in 0..5 {
            let (embeddings, truth) = talk(&mut Normal(seed), &turns);
            // Each turn begins as three people.
            let mut begin = Vec::new();
            for (turn, (_, count)) in turns.iter().enumerate() {
                begin.extend((0..*count).map(|i| 3 * turn + 3 * i / count));
            }
            assert_eq!(refine(&embeddings, &PSI, &begin, &Vbx::default()), truth, "seed {seed}");
        }
    }

    #[test]
    fn one_person_stays_one_and_nobody_nobody() {
        let (embeddings, truth) = talk(&mut Normal(3), &[(0, 60)]);
        assert_eq!(refine(&embeddings, &PSI, &(0..60).map(|i| i % 5).collect::<Vec<_>>(), &Vbx::default()), truth);
        assert_eq!(refine(&embeddings, &PSI, &[0; 60], &Vbx::default()), truth);
        assert!(refine(&[], &PSI, &[], &Vbx::default()).is_empty());
    }

    #[test]
    fn the_bound_never_falls() {
        let (embeddings, _) = talk(&mut Normal(11), &[(0, 20), (1, 20), (2, 20), (0, 20)]);
        let begin: Vec<usize> = (0..80).map(|i| i / 8).collect();
        let mut model = Model::new(&embeddings, &PSI, &begin, 10, &Vbx::default());
        let bounds: Vec<f64> = (0..12).map(|_| model.iterate(&Vbx::default())).collect();
        assert!(bounds.windows(2).all(|b| b[1] >= b[0] - 1e-9), "{bounds:?}");
        for row in &model.responsibilities {
            assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        }
        assert!((model.priors.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        let needed = model.priors.iter().filter(|prior| **prior > 0.05).count();
        assert_eq!(needed, 3, "who is not needed loses the prior: {:?}", model.priors);
    }
}

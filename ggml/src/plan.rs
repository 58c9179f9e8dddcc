//! Which variables a CTranslate2 Whisper folder has, and from which tensors of a ggml file each comes; pure.
//!
//! Both keep matrices as rows of outputs and kernels as output, input, place: nothing is turned. CTranslate2 wants queries,
//! keys and values of a layer in one matrix (keys and values in cross attention), with zeros as the bias that Whisper's keys
//! do not have. The layout is revision 3 of its `WhisperSpec`.

use std::collections::HashMap;

use crate::layout::{Layout, Tensor};

/// A variable of the folder.
#[derive(Debug, Clone, PartialEq)]
pub struct Variable {
    pub name: String,
    /// Empty for attributes.
    pub shape: Vec<u64>,
    pub content: Content,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    Byte(i8),
    Short(i16),
    /// One after the other.
    Numbers {
        parts: Vec<Part>,
        matrix: bool,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// Its place in the layout.
    Tensor(usize),
    Zeros(u64),
}

/// Everything in `model.bin` but the numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// By name.
    pub variables: Vec<Variable>,
    /// Second name and first name of a variable.
    pub aliases: Vec<(String, String)>,
}

/// The error says which tensor is missing, misshapen or left over.
pub fn plan(layout: &Layout) -> Result<Plan, String> {
    let mut planner = Planner::new(layout);
    planner.around();
    for layer in 0..layout.header.audio_layers {
        planner.layer("encoder", layer, false);
    }
    for layer in 0..layout.header.text_layers {
        planner.layer("decoder", layer, true);
    }
    planner.finish()
}

struct Planner<'a> {
    layout: &'a Layout,
    /// Tensors not used yet.
    left: HashMap<&'a str, usize>,
    variables: Vec<Variable>,
    /// The first thing that was wrong.
    wrong: Option<String>,
}

impl<'a> Planner<'a> {
    fn new(layout: &'a Layout) -> Self {
        let left = layout.tensors.iter().enumerate().map(|(n, tensor)| (tensor.name.as_str(), n)).collect();
        Self { layout, left, variables: Vec::new(), wrong: None }
    }

    fn around(&mut self) {
        let header = self.layout.header;
        let (width, mels) = (u64::from(header.width), u64::from(header.mels));
        // Heads divide a width of at most 4096.
        let heads = |n: u32| Content::Short(i16::try_from(n).unwrap_or(i16::MAX));
        self.attribute("encoder/num_heads", heads(header.audio_heads));
        self.attribute("decoder/num_heads", heads(header.text_heads));
        self.attribute("decoder/pre_norm", Content::Byte(1));
        // GELU in CTranslate2's list of activations.
        self.attribute("decoder/activation", Content::Byte(3));
        // Of general translation models; its converter writes them for Whisper too.
        self.attribute("decoder/alignment_layer", Content::Short(-1));
        self.attribute("decoder/alignment_heads", Content::Short(1));
        for no in
            ["scale_embeddings", "alibi", "alibi_use_positive_positions", "scale_alibi", "start_from_zero_embedding"]
        {
            self.attribute(&format!("decoder/{no}"), Content::Byte(0));
        }
        for (conv, inputs) in [("conv1", mels), ("conv2", width)] {
            self.numbers(&format!("encoder/{conv}/weight"), &[width, inputs, 3], &[&format!("encoder.{conv}.weight")]);
            self.numbers(&format!("encoder/{conv}/bias"), &[width], &[&format!("encoder.{conv}.bias")]);
        }
        for (side, positions) in [("encoder", header.audio_ctx), ("decoder", header.text_ctx)] {
            let from = format!("{side}.positional_embedding");
            self.numbers(&format!("{side}/position_encodings/encodings"), &[u64::from(positions), width], &[&from]);
        }
        self.norm("encoder/layer_norm", "encoder.ln_post");
        self.norm("decoder/layer_norm", "decoder.ln");
        let embeddings = [u64::from(header.vocab), width];
        self.numbers("decoder/embeddings/weight", &embeddings, &["decoder.token_embedding.weight"]);
    }

    fn layer(&mut self, side: &str, layer: u32, crosses: bool) {
        let (to, from) = (format!("{side}/layer_{layer}"), format!("{side}.blocks.{layer}"));
        let width = u64::from(self.layout.header.width);
        let (own, own_from) = (format!("{to}/self_attention"), format!("{from}.attn"));
        self.norm(&format!("{own}/layer_norm"), &format!("{own_from}_ln"));
        self.linear(&format!("{own}/linear_0"), width, width, &own_from, &["query", "key", "value"]);
        self.linear(&format!("{own}/linear_1"), width, width, &own_from, &["out"]);
        if crosses {
            let (cross, cross_from) = (format!("{to}/attention"), format!("{from}.cross_attn"));
            self.norm(&format!("{cross}/layer_norm"), &format!("{cross_from}_ln"));
            self.linear(&format!("{cross}/linear_0"), width, width, &cross_from, &["query"]);
            self.linear(&format!("{cross}/linear_1"), width, width, &cross_from, &["key", "value"]);
            self.linear(&format!("{cross}/linear_2"), width, width, &cross_from, &["out"]);
        }
        let (ffn, ffn_from) = (format!("{to}/ffn"), format!("{from}.mlp"));
        self.norm(&format!("{ffn}/layer_norm"), &format!("{ffn_from}_ln"));
        self.linear(&format!("{ffn}/linear_0"), 4 * width, width, &ffn_from, &["0"]);
        self.linear(&format!("{ffn}/linear_1"), width, 4 * width, &ffn_from, &["2"]);
    }

    fn attribute(&mut self, name: &str, content: Content) {
        self.variables.push(Variable { name: name.to_owned(), shape: Vec::new(), content });
    }

    fn norm(&mut self, to: &str, from: &str) {
        let width = [u64::from(self.layout.header.width)];
        self.numbers(&format!("{to}/gamma"), &width, &[&format!("{from}.weight")]);
        self.numbers(&format!("{to}/beta"), &width, &[&format!("{from}.bias")]);
    }

    /// One matrix of `outputs` rows per name, and their bias.
    fn linear(&mut self, to: &str, outputs: u64, inputs: u64, from: &str, names: &[&str]) {
        let all = outputs * names.len() as u64;
        let weights: Vec<String> = names.iter().map(|name| format!("{from}.{name}.weight")).collect();
        let weights: Vec<&str> = weights.iter().map(String::as_str).collect();
        self.numbers(&format!("{to}/weight"), &[all, inputs], &weights);
        let parts = names
            .iter()
            .filter_map(|name| match *name {
                "key" => Some(Part::Zeros(outputs)),
                _ => self.take(&format!("{from}.{name}.bias"), outputs),
            })
            .collect();
        let content = Content::Numbers { parts, matrix: false };
        self.variables.push(Variable { name: format!("{to}/bias"), shape: vec![all], content });
    }

    fn numbers(&mut self, name: &str, shape: &[u64], from: &[&str]) {
        let each = shape.iter().product::<u64>() / from.len().max(1) as u64;
        let parts = from.iter().filter_map(|tensor| self.take(tensor, each)).collect();
        let content = Content::Numbers { parts, matrix: name.ends_with("/weight") };
        self.variables.push(Variable { name: name.to_owned(), shape: shape.to_vec(), content });
    }

    /// A tensor of so many numbers. Which of its sizes is which follows from the model's shape.
    fn take(&mut self, name: &str, numbers: u64) -> Option<Part> {
        let found = self.left.remove(name).map(|n| (n, &self.layout.tensors[n]));
        let why = match found {
            None => format!("tensor {name} is missing"),
            Some((_, Tensor { shape, .. })) if shape.iter().product::<u64>() != numbers => {
                format!("tensor {name} of {shape:?} numbers, expected {numbers} of them")
            }
            Some((n, _)) => return Some(Part::Tensor(n)),
        };
        self.wrong.get_or_insert(why);
        None
    }

    fn finish(mut self) -> Result<Plan, String> {
        if let Some(why) = self.wrong {
            return Err(why);
        }
        if let Some(name) = self.left.keys().min() {
            return Err(format!("tensor {name} is of no Whisper model"));
        }
        self.variables.sort_by(|a, b| a.name.cmp(&b.name));
        let aliases = vec![("decoder/projection/weight".to_owned(), "decoder/embeddings/weight".to_owned())];
        Ok(Plan { variables: self.variables, aliases })
    }
}

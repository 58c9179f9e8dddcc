"""Write the encoder as ONNX and compare it with torch.

    python export.py --checkpoint run/encoder.pt --out ../encoder.onnx

feats [B, T, 80] float32 -> embs [B, 160] float32, not normalised. Beside it goes encoder.onnx.sha256.
"""
import argparse
import hashlib
import os

import numpy as np
import onnx
import onnxruntime
import torch

from network import Encoder

PROPERTIES = {
    "framework": "voxfleet",
    "model": "voxfleet speaker encoder",
    "sample_rate": "16000",
    "feature": "kaldi-fbank-80-cmn",
    "dims": "160",
    "normalised": "no",
    "licence": "Apache-2.0 (trained in part on LibriSpeech, CC BY 4.0)",
}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--checkpoint", required=True)
    ap.add_argument("--out", required=True)
    args = ap.parse_args()
    net = Encoder()
    net.load_state_dict(torch.load(args.checkpoint)["net"])
    net.eval()
    example = torch.randn(2, 200, 80)
    torch.onnx.export(net, (example,), args.out, input_names=["feats"], output_names=["embs"], opset_version=17, dynamo=False,
                      do_constant_folding=True, dynamic_axes={"feats": {0: "B", 1: "T"}, "embs": {0: "B"}})
    model = onnx.load(args.out)
    for k, v in PROPERTIES.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = k, v
    model.doc_string = "Speaker embeddings from 80 mean-free Kaldi log mel energies"
    onnx.checker.check_model(model)
    onnx.save(model, args.out)
    session = onnxruntime.InferenceSession(args.out, providers=["CPUExecutionProvider"])
    for shape in [(1, 30, 80), (3, 77, 80), (1, 998, 80)]:
        x = torch.randn(shape)
        with torch.no_grad():
            want = net(x).numpy()
        got = session.run(["embs"], {"feats": x.numpy()})[0]
        print(shape, got.shape, f"greatest difference {np.abs(got - want).max():.6f}")
        assert np.abs(got - want).max() < 1e-3
    digest = hashlib.sha256(open(args.out, "rb").read()).hexdigest()
    with open(args.out + ".sha256", "w") as f:
        f.write(f"{digest}  {os.path.basename(args.out)}\n")
    print(os.path.getsize(args.out), "bytes", digest)


if __name__ == "__main__":
    main()

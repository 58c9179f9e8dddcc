#!/usr/bin/env python3
"""sherpa-onnx's offline diarization over recordings, with the segmentation network and the encoder that it is given: what
`voxfleet bench diarize --peers` compares with.

    pip install sherpa-onnx==2.0.1 onnx==1.23.2 numpy
    python3 peer.py SEGMENTATION.onnx ENCODER.onnx FOLDER

FOLDER/runs.json lists {"name", "speakers", "threshold"}: how many people there are, or at which distance its clustering stops.
NAME.f32 holds the samples: one channel, 16 kHz, 32-bit floats. Each run gives one JSON object a line. Copies of both networks
with the metadata that sherpa-onnx reads are left in FOLDER. Exits 77 where a package is missing."""

import json
import pathlib
import sys
import time

try:
    import numpy
    import onnx
    import sherpa_onnx
except ImportError as missing:
    print(f"skipped: {missing}", file=sys.stderr)
    sys.exit(77)

WINDOW = 160_000


def described(source, copy, facts):
    network = onnx.load(source)
    del network.metadata_props[:]
    for key, value in facts.items():
        network.metadata_props.add(key=key, value=str(value))
    onnx.save(network, copy)
    return str(copy)


def main(segmentation, encoder, folder):
    folder = pathlib.Path(folder)
    dims = onnx.load(encoder).graph.output[-1].type.tensor_type.shape.dim[-1].dim_value
    segmentation = described(segmentation, folder / "segmentation.onnx", {
        "model_type": "pyannote-segmentation-3.0", "sample_rate": 16_000, "num_speakers": 3, "num_classes": 7,
        "powerset_max_classes": 2, "window_size": WINDOW, "receptive_field_size": 991, "receptive_field_shift": 270,
    })
    # Samples in the 16-bit range, and each band's mean taken away, as WeSpeaker's networks and ours want it.
    encoder = described(encoder, folder / "encoder.onnx", {
        "framework": "wespeaker", "language": "English", "sample_rate": 16_000, "output_dim": dims, "normalize_samples": 0,
        "feature_normalize_type": "global-mean",
    })
    pyannote = sherpa_onnx.OfflineSpeakerSegmentationPyannoteModelConfig(model=segmentation)
    config = sherpa_onnx.OfflineSpeakerDiarizationConfig(
        segmentation=sherpa_onnx.OfflineSpeakerSegmentationModelConfig(pyannote=pyannote, num_threads=1),
        embedding=sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=encoder, num_threads=1),
        clustering=sherpa_onnx.FastClusteringConfig(),
    )
    if not config.validate():
        sys.exit("sherpa-onnx does not take these networks")
    pipeline = sherpa_onnx.OfflineSpeakerDiarization(config)
    for run in json.loads((folder / "runs.json").read_text()):
        samples = numpy.fromfile(folder / f"{run['name']}.f32", "<f4")
        config.clustering = sherpa_onnx.FastClusteringConfig(
            num_clusters=run["speakers"] or -1, threshold=run["threshold"],
        )
        pipeline.set_config(config)
        begin = time.perf_counter()
        found = pipeline.process(samples).sort_by_start_time()
        took_s = time.perf_counter() - begin
        rttm = "".join(
            f"SPEAKER {run['name']} 1 {turn.start:.3f} {turn.end - turn.start:.3f} <NA> <NA> {turn.speaker} <NA> <NA>\n"
            for turn in found
        )
        print(json.dumps({**run, "took_s": took_s, "rttm": rttm, "version": sherpa_onnx.__version__}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

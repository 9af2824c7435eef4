"""Question: how much of the bare forward loop's speed has the feature extraction of `medim-ray probe`?

One Ray, one actor, one thread each: phantoms are decoded, cropped and encoded by `extract`, and the same crops, decoded
before, by the same encoder in a plain loop. Pairs in turn; prints images/s of both and the ratio of each pair.

    python benchmarks/probe_features.py [--images 960] [--size 224] [--pairs 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch

from medim_ray.config.loader import load
from medim_ray.config.schema import RunConfig
from medim_ray.data.ingest import PrepareConfig, prepare
from medim_ray.data.shards import ShardSet
from medim_ray.models.vit import ImageEncoder
from medim_ray.probes.encoders import encoder_source
from medim_ray.probes.features import decode_crops, extract, pixels_of
from medim_ray.probes.rows import RowReader, list_rows, work_items
from medim_ray.session import ray_session
from medim_ray.train.build import build_crop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=960)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options = ["source.name=phantom", f"source.num_images={args.images}", f"source.size={args.size}"]
        prepare(load(PrepareConfig, None, [*options, f"out={folder}"]))
        shards = ShardSet.open(folder)
        config = load(RunConfig, None, [f"data.shards={folder}", "run.dir=none", f"encoder.image_size={args.size}"])
        encoder = ImageEncoder(config.encoder).eval()
        rows = list_rows(shards)
        ratios = []
        with ray_session("", 2):
            source = encoder_source(encoder, config, build_crop(config))
            reader = RowReader.of(shards, "image_id", "image")
            crops = {source.crop_key: source.crop}
            blocks = [
                decode_crops({key: np.array([value], dtype=object) for key, value in item.items()}, reader, crops, None)
                for item in work_items(rows)
            ]
            bare = source.make("cpu")
            for _ in range(args.pairs):
                found = extract(shards, rows, {"encoder": source})
                started = time.perf_counter()
                for block in blocks:
                    pixels = pixels_of(block, source)
                    for first in range(0, len(pixels), 32):
                        bare.features(pixels[first : first + 32])
                loop = len(rows) / (time.perf_counter() - started)
                ratios.append(found.images_per_s / loop)
                print(
                    f"extract {found.images_per_s:6.1f} images/s, bare loop {loop:6.1f}: {ratios[-1]:.3f}", flush=True
                )
    print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()

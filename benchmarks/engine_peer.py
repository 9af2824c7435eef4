"""The plain loop that benchmarks/engine.py measures us against: torch DataLoader, DDP, AdamW; no Ray, no DeepSpeed.

    torchrun --nproc-per-node 2 benchmarks/engine_peer.py SHARDS OUT --steps 70 --micro 16 --checkpoint-every 50

The same network, images, batch, clipping and log as ours; a checkpoint is copied and then written by a thread.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from medim_ray.data.shards import ShardSet
from medim_ray.masking import MASKINGS
from medim_ray.models.vit import ImageEncoder
from medim_ray.objectives.base import Parts
from medim_ray.objectives.mae import Mae
from medim_ray.types import Batch

SIZE, LONGEST, NUM_PATCHES = 224, 240, 196


class Images(Dataset[Tensor]):
    """Encoded images of the training split, decoded, resized, padded and cropped one by one."""

    def __init__(self, shards: str) -> None:
        self.encoded = ShardSet.open(shards).read_rows("train", ["image"])["image"].to_pylist()

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Tensor:
        image = cv2.imdecode(np.frombuffer(self.encoded[index], np.uint8), cv2.IMREAD_GRAYSCALE)
        assert image is not None
        ratio = LONGEST / max(image.shape)
        image = cv2.resize(image, (round(image.shape[1] * ratio), round(image.shape[0] * ratio)))
        square = np.zeros((LONGEST, LONGEST), np.uint8)
        top, left = (LONGEST - image.shape[0]) // 2, (LONGEST - image.shape[1]) // 2
        square[top : top + image.shape[0], left : left + image.shape[1]] = image
        y, x = torch.randint(0, LONGEST - SIZE + 1, (2,)).tolist()
        return torch.from_numpy(square[None, y : y + SIZE, x : x + SIZE].copy())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--micro", type=int, required=True)
    parser.add_argument("--checkpoint-every", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    encoder = ImageEncoder(ImageEncoder.Config(name="vit_small_patch16_224"))
    masking: Any = MASKINGS["uniform"](MASKINGS["uniform"].Config())
    parts = Parts(encoder=encoder, text=None, masking=masking, num_steps=args.steps, global_batch=args.micro)
    model = DistributedDataParallel(Mae(Mae.Config(), parts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    images = Images(args.shards)
    sampler: DistributedSampler[Tensor] = DistributedSampler(images, drop_last=True)
    loader = DataLoader(
        images, args.micro, sampler=sampler, num_workers=1, persistent_workers=True, prefetch_factor=4, drop_last=True
    )
    args.out.mkdir(parents=True, exist_ok=True)
    step, log = 0, (args.out / "metrics.jsonl").open("w")
    while step < args.steps:
        sampler.set_epoch(step)
        for pixels in loader:
            order = torch.rand(len(pixels), NUM_PATCHES).argsort(dim=1)
            hidden_BN = order < round(NUM_PATCHES * masking.config.ratio)
            batch = Batch(
                step=step,
                image_ids=("",) * len(pixels),
                views={"image": pixels.float() / 255.0},
                columns={"mask/uniform_BN": hidden_BN},
            )
            optimizer.zero_grad()
            loss = model(batch).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                record = {"step": step, "loss": mean.item(), "grad_norm": norm.item(), "ended_at": time.time()}
                log.write(json.dumps(record) + "\n")
                log.flush()
            step += 1
            if step % args.checkpoint_every == 0 and dist.get_rank() == 0:
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
                copied = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, state)
                threading.Thread(target=torch.save, args=(copied, args.out / f"step-{step}.pt")).start()
            if step == args.steps:
                break
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

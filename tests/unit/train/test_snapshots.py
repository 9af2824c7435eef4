"""Masks by published weights: which snapshot masks which step, and maps that are those of the weights published."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medim_ray.data.reader import EPOCH, IMAGE_ID, STEP, VIEW
from medim_ray.data.transforms import View
from medim_ray.masking.report import MAPS, ReportMasking
from medim_ray.train.snapshot_store import SnapshotStore, source_step
from medim_ray.train.snapshots import Attender, Publisher
from tests.unit.objectives.batches import batch_for, build

SMALL: dict[str, Any] = {
    "projection_hidden": 32,
    "projection_dim": 16,
    "decoder_widths": (8, 8, 8, 8),
    "num_prototypes": 8,
}
EVERY = 4


@given(step=st.integers(0, 10_000), every=st.integers(1, 500))
def test_a_snapshot_is_a_function_of_the_step_and_old_enough_to_run_ahead(step: int, every: int) -> None:
    at = source_step(step, every)
    assert at % every == 0 and at >= 0
    assert at == 0 or every <= step - at < 2 * every
    assert source_step(step + 1, every) >= at


def model() -> Any:
    return build("medim", {"name": "kdm+sdm"}, **SMALL)


def columns_of(steps: list[int]) -> dict[str, np.ndarray[Any, Any]]:
    """Four samples a step, as the decoding actors hand them on."""
    masking: Any = ReportMasking(ReportMasking.Config(attention="snapshot", snapshot_every=EVERY))
    blocks = []
    for step in steps:
        batch = batch_for(masking, model().encoder.grid, 4, 64, step)
        block = {name: value.numpy() for name, value in batch.columns.items()}
        pixels = (batch.views["image"].numpy()[:, None] * 255).astype(np.uint8)[:, :, 0]
        facts = {STEP: np.full(4, step), EPOCH: np.zeros(4, np.int64), IMAGE_ID: np.array(batch.image_ids, object)}
        jitter = np.tile(np.array([1, 1, 0, 0], np.float32), (4, 1, 1))
        blocks.append({**block, **facts, f"{VIEW}image": pixels, f"{VIEW}image/jitter_BK4": jitter})
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def attender(folder: Path) -> Attender:
    masking = ReportMasking(ReportMasking.Config(attention="snapshot", snapshot_every=EVERY))
    return Attender(masking, View("image", 1, 64, 1), str(folder), EVERY, model)


def test_maps_are_those_of_the_published_weights(tmp_path: Path) -> None:
    trained = model().train()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    publish = Publisher(SnapshotStore(str(tmp_path)), EVERY, trained, rank=0)
    for step in range(EVERY + 1):
        publish(step)
    assert SnapshotStore(str(tmp_path)).steps() == [EVERY]
    Publisher(SnapshotStore(str(tmp_path / "other")), EVERY, trained, rank=1)(EVERY)
    assert not (tmp_path / "other").exists(), "only rank 0 publishes"

    block = columns_of([7, 8])  # masked by step 0 and by step 4
    made = attender(tmp_path)(block)[MAPS]
    masking: Any = ReportMasking(ReportMasking.Config())
    for rows, weights in ((slice(0, 4), model()), (slice(4, 8), trained)):
        batch = batch_for(masking, weights.encoder.grid, 4, 64, 7 if rows.start == 0 else 8)
        pixels = (batch.views["image"] * 255).to(torch.uint8).float() / 255
        batch = type(batch)(step=0, image_ids=batch.image_ids, views={"image": pixels}, columns=batch.columns)
        attention = weights.eval().attention(batch)
        expected = masking.resolve(batch.columns, attention)
        np.testing.assert_allclose(made[rows], expected.maps_SBN.transpose(0, 1).numpy(), rtol=1e-5, atol=1e-7)
        resolved = attender(tmp_path).masking.resolve(
            {name: torch.from_numpy(value[rows]) for name, value in {**block, MAPS: made}.items() if "mask" in name},
            None,
        )
        assert torch.equal(resolved.hidden_SBN, expected.hidden_SBN)
    again = attender(tmp_path)
    alone = [again(columns_of([step]))[MAPS] for step in (8, 7)]  # another order, smaller blocks, another actor
    assert np.array_equal(np.concatenate(alone[::-1]), made)


def test_a_finished_model_looks_at_each_global_crop_alone() -> None:
    block = columns_of([0])
    pixels = block.pop(f"{VIEW}image")
    names = (f"{VIEW}image/jitter_BK4", f"{VIEW}global/jitter_BK4")
    block[names[1]] = np.repeat(block.pop(names[0]), 2, axis=1)
    other = pixels[:, :, ::-1].copy()
    block[f"{VIEW}global"] = np.concatenate([pixels, other], axis=1)
    block[f"{VIEW}local"] = np.zeros((4, 6, 32, 32), np.uint8)

    class Looks:
        """A strategy that keeps what it is shown."""

        def attend(self, columns: dict[str, Any], attention_KBWN: list[torch.Tensor]) -> dict[str, Any]:
            return {"seen": torch.stack(attention_KBWN, dim=1).numpy()}

    seen = Attender(Looks(), View("global", 2, 64, 1), "", 0, model)(block)["seen"]
    alone = []
    for crop in (pixels, other):
        one = {**block, f"{VIEW}image": crop, names[0]: block[names[1]][:, :1]}
        alone.append(Attender(Looks(), View("image", 1, 64, 1), "", 0, model)(one)["seen"][:, 0])
    np.testing.assert_array_equal(seen, np.stack(alone, axis=1))
    assert not np.array_equal(alone[0], alone[1])


def test_a_start_removes_what_a_rolled_back_run_published_and_misses_what_is_gone(tmp_path: Path) -> None:
    store = SnapshotStore(str(tmp_path))
    for step in (4, 8, 12, 16):
        store.publish(step, {"x": torch.full((2,), float(step))})
    store.begin(13, EVERY)
    assert store.steps() == [4, 8, 12]
    assert store.wait(12)["x"].tolist() == [12.0, 12.0]
    store.prune(oldest_checkpoint=13, every=EVERY)
    assert store.steps() == [8, 12], "step 13 is masked by 8"
    store.begin(12, EVERY)  # 12 itself is published again
    with pytest.raises(ValueError, match=r"step-00000008\.safetensors is gone"):
        SnapshotStore(str(tmp_path / "nothing")).begin(13, EVERY)


def test_options_that_do_not_fit_each_other_are_told() -> None:
    config = partial(ReportMasking.Config, attention="snapshot")
    with pytest.raises(ValueError, match="takes one of the two"):
        config()
    with pytest.raises(ValueError, match="takes one of the two"):
        config(snapshot_every=10, snapshot_run="runs/one")
    with pytest.raises(ValueError, match=r"with masking\.attention=snapshot only"):
        ReportMasking.Config(snapshot_every=10)

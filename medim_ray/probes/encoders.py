"""The encoders a probe compares, by name: the run's own weights, those it began with, raw pixels, and by option other
runs, timm's and Hugging Face's models. One that can't be loaded here is told with its reason and never replaced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medim_ray.config.schema import RunConfig
from medim_ray.data.transforms import CROPS, Crop
from medim_ray.models.vit import ImageEncoder
from medim_ray.probes.features import Source
from medim_ray.probes.trainable import HubEncoder, OwnEncoder, PixelPatches, Trainable
from medim_ray.train.build import build_crop
from medim_ray.train.runs import LoadedRun, load_run

TRAINED, UNTRAINED, PIXELS = "trained", "untrained", "pixels"
PIXELS_SIDE = 32
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """sources: by name, in the order of tables; missing: name -> why it is not available here."""

    sources: Mapping[str, Source]
    missing: Mapping[str, str]


def open_encoders(run: LoadedRun, untrained: LoadedRun, names: Sequence[str]) -> Encoders:
    """The run's encoder, its untrained self and raw pixels, then those of `names` ("run:PATH", "timm:NAME",
    "hf:ID or folder"). Needs a running Ray: weights are put into its object store.

    ValueError where the weights of the run are not finite.
    """
    size = run.config.encoder.image_size
    sources = {
        TRAINED: encoder_source(run.objective.encoder, run.config, build_crop(run.config)),
        UNTRAINED: encoder_source(untrained.objective.encoder, run.config, build_crop(run.config)),
        PIXELS: replace(
            _source(raw_pixels(int(run.objective.encoder.patch_size)), run.config, size, "pixels"), has_weights=False
        ),
    }
    missing = {}
    for name in dict.fromkeys(names):
        if name in sources:
            continue
        kind, _, where = name.partition(":")
        try:
            sources[name] = _OPEN[kind](where, run.config)
        except Exception as error:  # hubs, files, formats: dozens of classes, and each of them means the same here
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            missing[name] = why.replace("https://", "")  # a report refers to nothing outside
    return Encoders(sources=sources, missing=missing)


# --- Ours ----------------------------------------------------------------------------------------------------------


def raw_pixels(patch_size: int) -> Any:
    """A maker of raw pixels: features = the crop averaged over areas down to 32 x 32, patches = their gray values."""
    return partial(_RawPixels, patch_size)


class _RawPixels:
    def __init__(self, patch_size: int, device: str) -> None:
        self._patch_size = patch_size

    def features(self, pixels_BHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        side = (PIXELS_SIDE, PIXELS_SIDE)
        small = [cv2.resize(image_HW, side, interpolation=cv2.INTER_AREA) for image_HW in pixels_BHW]
        return np.stack(small).reshape(len(small), -1).astype(np.float32) / np.float32(255.0)

    def patches(self, pixels_BHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        num, height, width = pixels_BHW.shape
        p = self._patch_size
        tiles = pixels_BHW.reshape(num, height // p, p, width // p, p).transpose(0, 1, 3, 2, 4)
        return tiles.reshape(num, -1, p * p).astype(np.float32) / np.float32(255.0)

    def trainable(self) -> Trainable:
        return PixelPatches(self._patch_size)


def frozen_encoder(encoder: ImageEncoder) -> Any:
    """A maker of the encoder with its present weights, put into the object store once.

    Features: the global vector and the mean of the patches, side by side.
    """
    weights = ray.put({name: tensor.detach().cpu() for name, tensor in encoder.state_dict().items()})
    return partial(_from_store, encoder.config, weights)


def frozen_features(out: Any) -> NDArray[np.float32]:
    """[B, 2 D]: the global vector and the mean of the patches, side by side, of what an encoder gave."""
    found: NDArray[np.float32] = torch.cat([out.global_BD, out.patches_BND.mean(dim=1)], dim=1).cpu().numpy()
    return found


def _from_store(config: ImageEncoder.Config, weights: Any, device: str) -> _Frozen:
    encoder = ImageEncoder(replace(config, init="random"))  # the weights come from the object store
    encoder.load_state_dict(ray.get(weights))
    return _Frozen(encoder, device)


class _Frozen:
    def __init__(self, encoder: ImageEncoder, device: str) -> None:
        self._encoder, self._device = encoder.float().eval().to(device), device

    @torch.no_grad()
    def _encode(self, pixels_BHW: NDArray[np.uint8]) -> Any:
        images_B1HW = torch.from_numpy(np.ascontiguousarray(pixels_BHW)).to(self._device)[:, None].float() / 255.0
        return self._encoder(images_B1HW)

    def features(self, pixels_BHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        return frozen_features(self._encode(pixels_BHW))

    def patches(self, pixels_BHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._encode(pixels_BHW).patches_BND.cpu().numpy()
        return found

    def trainable(self) -> Trainable:
        return OwnEncoder(self._encoder)


def encoder_source(encoder: ImageEncoder, config: RunConfig, crop: Crop) -> Source:
    """An encoder of a run with its present weights, on crops of that run. Needs a running Ray."""
    size = encoder.config.image_size
    key = f"{replace(encoder.config, init='')} {weights_hash(encoder)}"
    return _source(frozen_encoder(encoder), config, size, key, crop)


def source_here(run: LoadedRun) -> Source:
    """The encoder of a run for this process alone: its weights are neither copied nor hashed, so nothing is cached."""
    size = run.config.encoder.image_size
    return _source(partial(_Frozen, run.objective.encoder), run.config, size, "", build_crop(run.config))


def _of_run(path: str, config: RunConfig) -> Source:
    run = load_run(path)
    return encoder_source(run.objective.encoder, run.config, build_crop(run.config))


def weights_hash(module: nn.Module) -> str:
    """Sixteen hexadecimal digits over names and values of the weights; ValueError where they are not finite, so that
    there are no features."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"its weights are not finite ({name}): the training of this encoder has diverged")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _source(make: Any, config: RunConfig, size: int, key: str, crop: Crop | None = None) -> Source:
    """The framing of the probed run at the encoder's own input size, unless it has its own."""
    crop = crop or CROPS[config.crop.name](config.crop, size)
    crop_key = f"{config.crop} {size}"
    return Source(make=make, crop=crop, crop_key=crop_key, key=f"{crop_key} {key}")


# --- Others' -------------------------------------------------------------------------------------------------------


def _of_timm(name: str, config: RunConfig) -> Source:
    import timm

    facts = timm.get_pretrained_cfg(name)
    if facts is None:
        raise ValueError(f"timm has no pretrained weights of the name {name!r}")
    own = ImageEncoder.Config(
        name=name,
        image_size=facts.input_size[-1],
        init="timm",
        mean=float(np.mean(facts.mean)),
        std=float(np.mean(facts.std)),
    )
    encoder = ImageEncoder(own)
    return encoder_source(encoder, config, CROPS[config.crop.name](config.crop, own.image_size))


def _of_hub(where: str, config: RunConfig) -> Source:
    """Any vision model of transformers that gives patch tokens or a feature map, by id or folder.

    Size, mean and deviation are those of its image processor; without one the model's size and ImageNet's values.
    """
    import transformers

    model, report = transformers.AutoModel.from_pretrained(where, dtype=torch.float32, output_loading_info=True)
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(f"{where}: {len(missing)} weights are missing, e.g. {missing[0]}; it is no whole encoder")
    size, mean, std = _preprocessing(where, model.config)
    weights = ray.put({name: tensor.detach() for name, tensor in model.state_dict().items()})
    make = partial(_Hub, model.config, weights, mean, std)
    make("cpu").features(np.zeros((1, size, size), dtype=np.uint8))  # it takes gray images of this size, or says why
    return _source(make, config, size, f"{mean} {std} {weights_hash(model)}")


def _preprocessing(where: str, model: Any) -> tuple[int, Sequence[float], Sequence[float]]:
    import transformers

    try:
        processor = transformers.AutoImageProcessor.from_pretrained(where)
    except (OSError, ValueError):
        return int(model.image_size), *_IMAGENET
    size = dict(getattr(processor, "crop_size", None) or processor.size)
    side = size.get("height") or size.get("shortest_edge") or model.image_size
    mean, std = processor.image_mean or _IMAGENET[0], processor.image_std or _IMAGENET[1]
    return int(side), tuple(mean), tuple(std)


class _Hub:
    def __init__(self, config: Any, weights: Any, mean: Sequence[float], std: Sequence[float], device: str) -> None:
        import transformers

        model = transformers.AutoModel.from_config(config)
        model.load_state_dict(ray.get(weights))
        self._model, self._device = model.float().eval().to(device), device
        self._mean_C11, self._std_C11 = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))

    @torch.no_grad()
    def _encode(self, pixels_BHW: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        """Global vector [B, D] and patches [B, N, D]."""
        images_B1HW = torch.from_numpy(np.ascontiguousarray(pixels_BHW)).to(self._device)[:, None].float() / 255.0
        states: Tensor = self._model(pixel_values=(images_B1HW - self._mean_C11) / self._std_C11).last_hidden_state
        if states.ndim == 4:
            patches_BND = states.flatten(2).transpose(1, 2)
            return patches_BND.mean(dim=1), patches_BND
        num_patches = (pixels_BHW.shape[1] // int(self._model.config.patch_size)) ** 2
        num_prefix = states.shape[1] - num_patches
        if num_prefix < 0:
            raise ValueError(f"{states.shape[1]} tokens for {num_patches} patches: they are no grid of patches")
        patches_BND = states[:, num_prefix:]
        return (states[:, 0] if num_prefix else patches_BND.mean(dim=1)), patches_BND

    def features(self, pixels_BHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        global_BD, patches_BND = self._encode(pixels_BHW)
        return torch.cat([global_BD, patches_BND.mean(dim=1)], dim=1).cpu().numpy()

    def patches(self, pixels_BHW: NDArray[np.uint8]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self._encode(pixels_BHW)[1].cpu().numpy()
        return found

    def trainable(self) -> Trainable:
        return HubEncoder(self._model, self._mean_C11, self._std_C11)


_OPEN = {"run": _of_run, "timm": _of_timm, "hf": _of_hub}

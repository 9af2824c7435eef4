"""Compare us with numbers from the papers' own code: `python -m medim_ray.objectives.check_golden FILE.npz`.

Prints each quantity, the reference, ours and the error; exits 1 over tolerance, or when a reference quantity of the
file is unknown or missing. Losses, DINOv2's step, schedules, block masks: a kind is one entry in KINDS. No training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medim_ray.draws import Draws
from medim_ray.masking.report import ReportMasking
from medim_ray.masking.selection import high_patches, select_hidden
from medim_ray.objectives import losses
from medim_ray.objectives.comparison import Arrays, Comparison
from medim_ray.objectives.golden_dino import compare_dino, dino_names, dino_outputs
from medim_ray.objectives.golden_masks import MASK_OUTPUTS, compare_masks, mask_names
from medim_ray.objectives.golden_schedules import CURVES, compare_schedules


@dataclass(frozen=True)
class Kind:
    """A kind of golden file, known by any name in `markers`, which no other kind has.

    `names`: the reference quantities in a file; `outputs`: those that it must have; `compare` accounts for each output.
    """

    markers: Collection[str]
    names: Callable[[Arrays], set[str]]
    outputs: Callable[[Arrays], Collection[str]]
    compare: Callable[[Arrays], list[Comparison]]


MEDIM_OUTPUTS = (
    *("out_ita", "out_local", "out_proto", "out_reconstruction", "out_acc1", "out_acc5"),
    *("out_kdm_map", "out_sdm_map", "out_hidden_kdm", "out_hidden_sdm"),
)


def medim_names(arrays: Arrays) -> set[str]:
    """Names of the reference quantities of a file."""
    return {key for key in arrays if key.startswith("out_")}


def compare_medim(arrays: Arrays) -> list[Comparison]:
    """MedIM's terms, maps and masks from features and projections (golden notes in PAPERS.md)."""
    t = {key: torch.from_numpy(value) for key, value in arrays.items()}
    images_BD = F.normalize(t["img_feat"] @ t["w_img_global"], dim=-1)
    reports_BD = F.normalize(t["report_feat"] @ t["w_txt_global"], dim=-1)
    patches_BND = F.normalize(t["patch_feat"] @ t["w_img_local"], dim=-1)
    words_BWD = F.normalize(t["word_feat"] @ t["w_txt_local"], dim=-1)
    local, attention_BWN = losses.local_alignment(
        words_BWD,
        patches_BND,
        t["token_is_pad"][:, 1:],
        losses.clipped_weights(t["word_attention"], of_nonzero=True),
        losses.clipped_weights(t["cls_to_patch_attention"].mean(dim=1), of_nonzero=False),
        temperature=0.1,
        normalise_patch_context=False,
    )
    ours = {
        "out_ita": losses.image_text_contrast(images_BD, reports_BD, 0.07, images_BD, reports_BD, first=0),
        "out_local": local,
        "out_proto": losses.prototype_prediction(images_BD, reports_BD, t["prototypes"], 0.2, 0.05),
        "out_reconstruction": 5 * losses.reconstruction(t["decoder_out"].unflatten(0, (2, -1)), t["images"]).sum(),
    }
    lines = [Comparison(key, key[4:], arrays[key], value.numpy(), 1e-5) for key, value in ours.items()]
    for k in (1, 5):
        accuracy = 100 * losses.retrieval_accuracy(images_BD, reports_BD, k)
        # Percentages of a few pairs: equal up to the rounding of float32.
        lines.append(Comparison(f"out_acc{k}", f"acc{k} (percent)", arrays[f"out_acc{k}"], accuracy.numpy(), 1e-6))
    in_sentence_BW = t["sentence_id"][:, 1:] == t["chosen_sentence"][:, None]
    words = {"kdm": t["mesh_flag"][:, 1:], "sdm": in_sentence_BW & ~t["token_is_pad"][:, 1:]}
    for name, words_BW in words.items():
        lines += _compare_masks(name, arrays, words_BW.float(), attention_BWN)
    return lines


def _compare_masks(name: str, arrays: Arrays, words_BW: Tensor, attention_BWN: Tensor) -> list[Comparison]:
    """The map, and the numbers of high and of other patches hidden: the file's draw and ours, both in our classes."""
    map_BN = torch.einsum("bw,bwn->bn", words_BW, attention_BWN)
    config = ReportMasking.Config(fallback="paper")
    ids = [str(row) for row in range(len(map_BN))]
    draws = Draws.of(0, np.zeros(len(ids), np.int64), ids)
    noise_BN = torch.from_numpy(draws.uniform(f"mask/{name}", map_BN.shape[1])).float()
    hidden_BN, _ = select_hidden(map_BN, noise_BN, words_BW.any(dim=1), config)
    reference_BN = torch.from_numpy(arrays[f"out_hidden_{name}"]).flatten(1).bool()
    lines = [Comparison(f"out_{name}_map", f"{name} map", arrays[f"out_{name}_map"], map_BN.numpy(), 1e-6, False)]
    if reference_BN.shape != hidden_BN.shape:
        shape, ours = np.array(reference_BN.shape), np.array(hidden_BN.shape)
        return [*lines, Comparison(f"out_hidden_{name}", f"{name} hidden, shape", shape, ours, 0.0, False)]
    high_BN = high_patches(map_BN, config.ratio)
    for what, class_BN in (("high", high_BN), ("other", ~high_BN)):
        theirs_B, ours_B = ((mask_BN & class_BN).sum(dim=1).numpy() for mask_BN in (reference_BN, hidden_BN))
        lines.append(Comparison(f"out_hidden_{name}", f"{name} hidden of {what}", theirs_B, ours_B, 0.0, False))
    return lines


KINDS = (
    Kind(("img_feat",), medim_names, lambda _: MEDIM_OUTPUTS, compare_medim),
    Kind(("in_collated_global_crops",), dino_names, dino_outputs, compare_dino),
    Kind(tuple(CURVES), set, lambda _: tuple(CURVES), compare_schedules),
    Kind(("columns", "rows"), mask_names, lambda _: MASK_OUTPUTS, compare_masks),
)


def check(path: Path) -> int:
    """Print the comparison; 0 if everything agrees, 1 otherwise. ValueError for a file of no known kind."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    kind = next((kind for kind in KINDS if not arrays.keys().isdisjoint(kind.markers)), None)
    if kind is None:
        markers = ", ".join(marker for kind in KINDS for marker in kind.markers)
        raise ValueError(f"{path}: no golden file of a known kind; it must contain one of {markers}")
    names, outputs = kind.names(arrays), kind.outputs(arrays)
    failures = [f"{name} of the file is unknown: nothing was compared" for name in sorted(names - set(outputs))]
    missing = [name for name in outputs if name not in names]
    failures += [f"{name} is missing in the file" for name in missing]
    if not missing:
        lines = kind.compare(arrays)
        _print_table(lines)
        failures += [
            f"{line.what}: error {line.error:.2e} is over {line.tolerance:.2g}" for line in lines if not line.is_ok
        ]
        uncovered = set(outputs) - {line.key for line in lines}
        assert not uncovered, f"not compared: {uncovered}"
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def _print_table(lines: Sequence[Comparison]) -> None:
    width = max(len(line.what) for line in lines)
    print(f"{'quantity':{width}} {'reference':>16} {'ours':>16} {'error':>10} {'tolerance':>10}")
    for line in lines:
        unit = "rel" if line.relative else "abs"
        print(
            f"{line.what:{width}} {_shown(line.reference):>16} {_shown(line.ours):>16} {line.error:10.2e} "
            f"{line.tolerance:10.2g} {unit} {'ok' if line.is_ok else 'DIFFERS'}"
        )


def _shown(values: NDArray[Any]) -> str:
    """A number as it is; counts as a list; anything larger by its mean."""
    if values.ndim == 0:
        return f"{float(values):.8g}"
    if values.size <= 8 and np.issubdtype(values.dtype, np.integer):
        return ",".join(str(value) for value in values)
    return f"mean {values.mean():.6g}"


def main(arguments: Sequence[str]) -> int:
    """The command: one file."""
    if len(arguments) != 1:
        print("usage: python -m medim_ray.objectives.check_golden FILE.npz")
        return 2
    try:
        return check(Path(arguments[0]))
    except (ValueError, OSError, KeyError) as error:
        print(f"FAILED {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

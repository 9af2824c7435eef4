"""The photometric part of augmentation, on the device: brightness, contrast and blur by the numbers of a CropPlan."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def photometric(images_B1HW: Tensor, jitter_B3: Tensor, blur_radius: int) -> Tensor:
    """Brightness, contrast and blur on the device: float images in [0, 1], factors as in CropPlan.jitter_BK3.

    The kernel's radius is the view's, not the batch's, so that an image does not depend on its neighbours.
    """
    brightness, contrast, sigma = (jitter_B3[:, i, None, None, None] for i in range(3))
    images = images_B1HW * brightness
    mean = images.mean(dim=(2, 3), keepdim=True)
    images = ((images - mean) * contrast + mean).clamp(0.0, 1.0)
    blurred = jitter_B3[:, 2] > 0
    if not bool(blurred.any()):
        return images
    offsets = torch.arange(-blur_radius, blur_radius + 1, device=images.device, dtype=images.dtype)
    kernel_BK = torch.exp(-0.5 * (offsets / sigma[:, 0, 0].clamp(min=1e-3)) ** 2)
    kernel_BK = kernel_BK / kernel_BK.sum(dim=1, keepdim=True)
    stacked = F.pad(images.transpose(0, 1), (blur_radius,) * 4, mode="replicate")
    rows = F.conv2d(stacked, kernel_BK[:, None, :, None], groups=len(images))
    both = F.conv2d(rows, kernel_BK[:, None, None, :], groups=len(images)).transpose(0, 1)
    return torch.where(blurred[:, None, None, None], both, images)

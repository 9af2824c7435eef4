"""The photometric part of augmentation, on the device: brightness, contrast, blur, solarising (CropPlan)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def photometric(images_B1HW: Tensor, jitter_B4: Tensor, blur_radius: int) -> Tensor:
    """Brightness, contrast, blur, solarising on the device: float images in [0, 1], numbers as in CropPlan.jitter_BK4.

    The kernel's radius is the view's, not the batch's, so that an image does not depend on its neighbours.
    """
    brightness, contrast, _, solarised = (jitter_B4[:, i, None, None, None] for i in range(4))
    images = images_B1HW * brightness
    mean = images.mean(dim=(2, 3), keepdim=True)
    images = ((images - mean) * contrast + mean).clamp(0.0, 1.0)
    images = _blur(images, jitter_B4[:, 2], blur_radius)
    if bool((jitter_B4[:, 3] > 0).any()):
        images = torch.where((solarised > 0) & (images >= 0.5), 1.0 - images, images)
    return images


def _blur(images: Tensor, sigma_B: Tensor, blur_radius: int) -> Tensor:
    """Each image by its own Gaussian, as it is where sigma is 0."""
    blurred = sigma_B > 0
    if not bool(blurred.any()):
        return images
    offsets = torch.arange(-blur_radius, blur_radius + 1, device=images.device, dtype=images.dtype)
    kernel_BK = torch.exp(-0.5 * (offsets / sigma_B[:, None].clamp(min=1e-3)) ** 2)
    kernel_BK = kernel_BK / kernel_BK.sum(dim=1, keepdim=True)
    stacked = F.pad(images.transpose(0, 1), (blur_radius,) * 4, mode="replicate")
    rows = F.conv2d(stacked, kernel_BK[:, None, :, None], groups=len(images))
    both = F.conv2d(rows, kernel_BK[:, None, None, :], groups=len(images)).transpose(0, 1)
    return torch.where(blurred[:, None, None, None], both, images)

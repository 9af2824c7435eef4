"""medim-ray: pretrain chest X-ray encoders on a cluster with Ray Data, Ray Train and DeepSpeed."""

__version__ = "0.1.0"

"""Networks for tables (`wide_mlp`, `deepfm`, `dcnv2`) and for lists of documents (`ltr_mlp`, `ltr_linear`)."""

from jdistill.models.tabular.dcn import DCNv2
from jdistill.models.tabular.deepfm import DeepFM
from jdistill.models.tabular.ltr import LtrMLP, ltr_linear
from jdistill.models.tabular.wide_mlp import WideMLP

__all__ = ["DCNv2", "DeepFM", "LtrMLP", "WideMLP", "ltr_linear"]

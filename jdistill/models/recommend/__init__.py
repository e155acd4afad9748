"""Recommenders: networks that score items for users. They take a request as inputs, see `jdistill.types.Batch`."""

from jdistill.models.recommend.bpr import BPR
from jdistill.models.recommend.cdae import CDAE
from jdistill.models.recommend.gru4rec import GRU4Rec
from jdistill.models.recommend.lightgcn import lightgcn
from jdistill.models.recommend.neumf import NeuMF
from jdistill.models.recommend.sasrec import SASRec
from jdistill.models.recommend.two_tower import two_tower

__all__ = ["BPR", "CDAE", "GRU4Rec", "NeuMF", "SASRec", "lightgcn", "two_tower"]

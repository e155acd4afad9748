"""Matrix factorisation, as trained by BPR (Rendle et al. 2009)."""

from flax import linen as nn
from jax import Array

from jdistill.data.base import Schema
from jdistill.models.base import model, positive_integer
from jdistill.models.recommend._scores import Request, require_interactions, score
from jdistill.pytrees import require_positive
from jdistill.types import USERS_AND_ITEMS, Rows


@model("bpr", teacher={"dim": 200}, student={"dim": 20})
class BPR(nn.Module):
    """Matrix factorisation: the score is the inner product of a user's and an item's embedding.

    Embeddings, `user` [users, D] and `item` [items, D], start as N(0, `init_std`), biases as 0.

    Features: `user` [B, D], also as `embedding`; `item` [B, K, D], [C, D] or [items, D].

    Attributes:
      schema: of the data: how many users and items.
      dim: D.
      init_std: standard deviation of the embeddings as initialised.
      bias: whether each item has a bias, added to its scores.

    Raises:
      UsageError: a `dim` that is not a positive integer, an `init_std` that is not positive, data without users and items.
    """

    schema: Schema
    dim: int = 20
    init_std: float = 0.01
    bias: bool = False

    def __post_init__(self) -> None:
        require_interactions(self.schema)
        positive_integer(dim=self.dim)
        require_positive(init_std=self.init_std)
        super().__post_init__()

    @property
    def embedding_tables(self) -> Rows:
        """What `optim.rows` updates by rows."""
        return (*USERS_AND_ITEMS, (("bias",), "items")) if self.bias else USERS_AND_ITEMS

    @nn.compact
    def __call__(self, inputs: Request, train: bool = False) -> tuple[Array, dict[str, Array]]:
        del train
        normal = nn.initializers.normal(self.init_std)
        users = self.param("user", normal, (self.schema.users, self.dim))
        items = self.param("item", normal, (self.schema.items, self.dim))
        bias = self.param("bias", nn.initializers.zeros, (self.schema.items,)) if self.bias else None
        user = users[inputs["user"]]
        logits, item = score(user, items, inputs.get("items"), bias)
        return logits, {"user": user, "embedding": user, "item": item}

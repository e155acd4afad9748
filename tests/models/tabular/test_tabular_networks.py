"""Networks on tables: values against plain NumPy, sizes in closed form, features, categories, refused input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.data.base import Schema
from jdistill.errors import UsageError
from jdistill.models import DCNv2, DeepFM, WideMLP
from jdistill.models.tabular._encode import entries
from jdistill.modules import from_linen
from jdistill.registry import build

FIELDS = (0, 4, 0, 3, 2)
SCHEMAS = {"mixed": Schema(fields=FIELDS), "numbers": Schema(), "categories": Schema(fields=(4, 3, 2, 5, 6))}
WIDTHS = (6, 4)
NETWORKS = {
    "wide_mlp": lambda schema, k: WideMLP(outputs=k, schema=schema, dim=3, widths=WIDTHS),
    "wide_mlp wide": lambda schema, k: WideMLP(outputs=k, schema=schema, dim=3, widths=WIDTHS, wide=True),
    "deepfm": lambda schema, k: DeepFM(outputs=k, schema=schema, dim=3, widths=WIDTHS),
    "dcnv2": lambda schema, k: DCNv2(outputs=k, schema=schema, dim=3, widths=WIDTHS, layers=2),
    "dcnv2 stacked": lambda schema, k: DCNv2(outputs=k, schema=schema, dim=3, widths=WIDTHS, layers=2, structure="stacked"),
    "dcnv2 low rank": lambda schema, k: DCNv2(outputs=k, schema=schema, dim=3, widths=WIDTHS, layers=2, rank=2),
}
EACH = pytest.mark.parametrize("name", NETWORKS)


def rows_of(schema, n=7, seed=0):
    rng = np.random.default_rng(seed)
    fields = schema.fields or (0,) * 5
    return np.stack([rng.integers(0, f, n) if f else rng.normal(size=n) for f in fields], 1).astype(np.float32)


@functools.cache
def made(name, schema, k=2):
    """`(model, params, inputs)`, every parameter random, so that none hides another."""
    model, x = from_linen(NETWORKS[name](schema, k)), rows_of(schema)
    shapes, state = jax.eval_shape(model.init, jax.random.key(0), x)
    assert state == {}
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 2, shapes), x


@functools.cache
def computed(name, schema):
    model, params, x = made(name, schema)
    return jax.jit(lambda p, x: model.apply(p, {}, x)[0])(params, x)


def dense(params, name, x):
    return x @ params[name]["kernel"] + params[name].get("bias", 0)


def mlp(params, x):
    for i in range(1, len(WIDTHS) + 1):
        x = np.maximum(dense(params, f"fc{i}", x), 0)
    return x


def table_vectors(table, x, fields):
    """[B, D, dim] by plain loops: a category's row, a number's row times the number."""
    starts = [sum(max(n, 1) for n in fields[:d]) for d in range(len(fields))]
    out = np.zeros((*x.shape, table.shape[1]))
    for b, d in np.ndindex(*x.shape):
        out[b, d] = table[starts[d] + int(x[b, d])] if fields[d] else table[starts[d]] * x[b, d]
    return out


def concatenation(params, x, fields):
    numbers = x[:, [d for d, n in enumerate(fields) if not n]]
    chosen = [d for d, n in enumerate(fields) if n]
    if not chosen:
        return numbers
    v = table_vectors(params["vectors"]["embedding"], x[:, chosen], [fields[d] for d in chosen])
    return np.concatenate([v.reshape(len(x), -1), numbers], 1)


def expected(name, params, x, fields):
    kind, _, variant = name.partition(" ")
    if kind == "wide_mlp":
        embedding = mlp(params, concatenation(params, x, fields))
        if variant:
            embedding = np.concatenate([embedding, table_vectors(params["wide"]["embedding"], x, fields).sum(1)], 1)
    elif kind == "deepfm":
        v = table_vectors(params["vectors"]["embedding"], x, fields)
        pairs = np.zeros((len(x), v.shape[2]))
        for i in range(v.shape[1]):
            for j in range(i + 1, v.shape[1]):
                pairs += v[:, i] * v[:, j]
        first = table_vectors(params["first"]["embedding"], x, fields).sum(1)
        embedding = np.concatenate([mlp(params, v.reshape(len(x), -1)), first, pairs], 1)
    else:
        x0 = crossed = concatenation(params, x, fields)
        for i in (1, 2):
            inner = dense(params, f"cross{i}_v", crossed) if variant == "low rank" else crossed
            crossed = x0 * dense(params, f"cross{i}", inner) + crossed
        embedding = mlp(params, crossed) if variant == "stacked" else np.concatenate([crossed, mlp(params, x0)], 1)
    return embedding, dense(params, "fc", embedding)


@EACH
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_values_are_those_of_plain_numpy(name, schema):
    _, params, x = made(name, schema)
    outputs = computed(name, schema)
    fields = schema.fields or (0,) * 5
    double = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    embedding, logits = expected(name, double, x.astype(np.float64), fields)
    np.testing.assert_allclose(outputs.features["embedding"], embedding, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 3])
@EACH
def test_sizes_in_closed_form(name, k):
    _, params, _ = made(name, SCHEMAS["mixed"], k)
    rows, concatenated, dim = 4 + 3 + 2 + 2, 3 * 3 + 2, 3
    hidden = {"deepfm": 5 * dim}.get(name, concatenated)
    total = hidden * 6 + 6 + 6 * 4 + 4
    total += {
        "wide_mlp": (9 * dim) + 4 * k + k,
        "wide_mlp wide": (9 * dim) + rows * k + (4 + k) * k + k,
        "deepfm": rows * dim + rows * k + (4 + k + dim) * k + k,
        "dcnv2": 9 * dim + 2 * (11 * 11 + 11) + (11 + 4) * k + k,
        "dcnv2 stacked": 9 * dim + 2 * (11 * 11 + 11) + 4 * k + k,
        "dcnv2 low rank": 9 * dim + 2 * (11 * 2 + 2 * 11 + 11) + (11 + 4) * k + k,
    }[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total


@EACH
def test_features_head_jit_and_vmap(name):
    model, params, x = made(name, SCHEMAS["mixed"])
    outputs = computed(name, SCHEMAS["mixed"])
    features = outputs.features
    assert {k: v.shape for k, v in features.items() if k.startswith("hidden")} == {
        "hidden1": (7, 6), "hidden1_pre": (7, 6), "hidden2": (7, 4), "hidden2_pre": (7, 4),
    }  # fmt: skip
    np.testing.assert_allclose(model.head(params, features["embedding"]), outputs.logits, rtol=1e-5, atol=1e-5)
    plain = model.apply(params, {}, x)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, outputs)
    several = jax.tree.map(lambda leaf: np.stack([leaf, -leaf]), params)
    both = jax.jit(jax.vmap(lambda p: model.apply(p, {}, x)[0].logits))(several)
    np.testing.assert_allclose(both[0], outputs.logits, rtol=1e-4, atol=1e-5)


@EACH
def test_every_parameter_learns(name):
    model, params, x = made(name, SCHEMAS["mixed"])
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, {}, x)[0].logits ** 2)))(params)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


def test_all_zero_fields_are_numbers():
    x = rows_of(Schema())
    for name in NETWORKS:
        _, params, _ = made(name, Schema())
        same = from_linen(NETWORKS[name](Schema(fields=(0,) * 5), 2)).apply(params, {}, x)[0].logits
        np.testing.assert_allclose(same, computed(name, Schema()).logits, rtol=1e-4, atol=1e-5)


def test_deepfm_starts_as_the_papers_sum():
    """One logit: first order + sum over pairs of <v_i, v_j> x_i x_j + the MLP's (Guo et al. 2017, eq. 1 to 4)."""
    schema, x = SCHEMAS["mixed"], rows_of(SCHEMAS["mixed"])
    model = from_linen(DeepFM(outputs=1, schema=schema, dim=3, widths=WIDTHS))
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0), x)[0])
    params["first"]["embedding"] = np.random.default_rng(0).normal(size=(11, 1)).astype(np.float32)
    v = table_vectors(params["vectors"]["embedding"], x, FIELDS)
    fm = table_vectors(params["first"]["embedding"], x, FIELDS).sum((1, 2))
    fm += np.array([sum(np.dot(v[b, i], v[b, j]) for i in range(5) for j in range(i)) for b in range(len(x))])
    deep = mlp(params, v.reshape(len(x), -1)) @ params["fc"]["kernel"][:4] + params["fc"]["bias"]
    np.testing.assert_allclose(model.apply(params, {}, x)[0].logits[:, 0], fm + deep[:, 0], rtol=1e-4, atol=1e-5)


def test_wide_part_starts_as_a_sum():
    schema, x = SCHEMAS["mixed"], rows_of(SCHEMAS["mixed"])
    model = from_linen(WideMLP(outputs=2, schema=schema, dim=3, widths=WIDTHS, wide=True))
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0), x)[0])
    before = model.apply(params, {}, x)[0].logits
    params["wide"]["embedding"] = table = np.random.default_rng(0).normal(size=(11, 2)).astype(np.float32)
    hot = np.concatenate([(x[:, d, None] == np.arange(n)) if n else x[:, d, None] for d, n in enumerate(FIELDS)], 1)
    np.testing.assert_allclose(model.apply(params, {}, x)[0].logits - before, hot @ table, rtol=1e-4, atol=1e-5)


@EACH
def test_dropout_needs_a_key_and_acts_in_training_only(name):
    network = NETWORKS[name](SCHEMAS["mixed"], 2).clone(dropout=0.5)
    model, x = from_linen(network), rows_of(SCHEMAS["mixed"])
    params, _ = model.init(jax.random.key(0), x)
    one, two = (model.apply(params, {}, x, key=jax.random.key(i), train=True)[0].logits for i in (0, 1))
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(model.apply(params, {}, x)[0].logits, model.apply(params, {}, x)[0].logits)


def test_categories_outside_are_the_nearest():
    x = jnp.array([[-3.0, 9.0, 0.5], [1.0, 1.0, -2.0]])
    rows, values = entries(x, (2, 4, 0))
    np.testing.assert_array_equal(rows, [[0, 5, 6], [1, 3, 6]])
    np.testing.assert_array_equal(values, [[1, 1, 0.5], [1, 1, -2]])


@EACH
def test_categories_that_bfloat16_would_confuse_are_refused(name):
    network = NETWORKS[name](Schema(fields=(300, 0)), 2)
    with pytest.raises(UsageError, match="300 categories, bfloat16 holds whole numbers up to 256 exactly"):
        jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), jnp.zeros((2, 2), jnp.bfloat16)))
    small = NETWORKS[name](Schema(fields=(257, 0)), 2)
    jax.eval_shape(lambda: small.init_with_output(jax.random.key(0), jnp.zeros((2, 2), jnp.bfloat16)))


@EACH
def test_refused_inputs(name):
    network = NETWORKS[name](SCHEMAS["mixed"], 2)
    for shape, message in (((2, 4), "the schema describes 5 columns, the inputs have 4"), ((2, 8, 8, 1), "read inputs .B, D.")):
        with pytest.raises(UsageError, match=message):
            jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("wide_mlp", {"dim": 0}, "dim must be a positive integer, got 0"),
        ("deepfm", {"widths": [8, 0]}, "widths must be positive integers, got [8, 0]"),
        ("deepfm", {"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ("dcnv2", {"rank": -1}, "rank must be a positive integer, or 0 for full matrices, got -1"),
        ("dcnv2", {"structure": "stack"}, "structure must be one of parallel, stacked, got 'stack'; did you mean 'stacked'?"),
        ("wide_mlp", {"activation": "x"}, "activation must be one of relu, tanh, sigmoid, gelu, got 'x'"),
    ],
)
def test_refused_fields(name, fields, message):
    with pytest.raises(UsageError) as caught:
        build("student", {"name": name, **fields}, outputs=2, schema=SCHEMAS["mixed"])
    assert str(caught.value) == f"student.{message}"


@pytest.mark.parametrize("widths", [(), (5,)])
@pytest.mark.parametrize("name", ["wide_mlp", "deepfm", "dcnv2"])
def test_any_number_of_hidden_layers(name, widths):
    network = build("student", {"name": name, "widths": list(widths)}, outputs=3, schema=SCHEMAS["mixed"])
    (logits, features), _ = jax.eval_shape(network.init_with_output, jax.random.key(0), rows_of(SCHEMAS["mixed"]))
    assert logits.shape == (7, 3) and sum(n.startswith("hidden") for n in features) == 2 * len(widths)

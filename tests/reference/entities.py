"""Losses on users and items written again in plain NumPy, one entity and one pair at a time."""

import numpy as np


def unique(ids: np.ndarray, *features: np.ndarray) -> list[tuple[int, tuple[np.ndarray, ...]]]:
    """Of each id the place of its first entry, and the features there."""
    places = {int(one): i for i, one in reversed(list(enumerate(ids)))}
    return [(i, tuple(f[i] for f in features)) for i in sorted(places.values())]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def alpha(params: dict, t: np.ndarray) -> np.ndarray:
    return softmax(t @ params["selection"]["kernel"] + params["selection"]["bias"])


def expert_error(params: dict, s: np.ndarray, t: np.ndarray, noise: np.ndarray, temperature: float) -> float:
    """||t - sum_m z_m E_m(s)||^2 of one entity."""
    z = softmax((np.log(alpha(params, t) + 1e-10) + noise) / temperature)
    made = np.zeros(len(t))
    for m, share in enumerate(z):
        hidden = np.maximum(s @ params["in_kernel"][m] + params["in_bias"][m], 0)
        made += share * (hidden @ params["out_kernel"][m] + params["out_bias"][m])
    return float(((t - made) ** 2).sum())


def expert_errors(params: dict, found: list, noise: np.ndarray, temperature: float) -> float:
    return sum(expert_error(params, s, t, noise[i], temperature) for i, (s, t) in found)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.sqrt(x @ x) / np.sqrt(y @ y))


def ftd(found: list) -> float:
    total = 0.0
    for _, (s, t) in found:
        for _, (other_s, other_t) in found:
            total += (cosine(t, other_t) - cosine(s, other_s)) ** 2
    return total


def htd_topology(params: dict, users: list, items: list) -> float:
    """Entities in a group, and means of groups with all entities."""
    groups: dict[tuple, list] = {}
    for which, found in (("users", users), ("items", items)):
        for _, (s, t) in found:
            groups.setdefault((which, int(alpha(params[which], t).argmax())), []).append((s, t))
    total = 0.0
    for members in groups.values():
        for s, t in members:
            for other_s, other_t in members:
                if cosine(t, other_t) > 0:
                    total += (cosine(t, other_t) - cosine(s, other_s)) ** 2
        p_s, p_t = (np.mean([member[which] for member in members], axis=0) for which in (0, 1))
        for _, (s, t) in users + items:
            total += (cosine(p_t, t) - cosine(p_s, s)) ** 2
    return total

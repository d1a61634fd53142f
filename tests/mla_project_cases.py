"""Arguments of mla_project and mla_project_append, shared by their tests."""

import torch

TABLES = ("cos", "sin")
# D, Rq, H, Dn, E, R
DIMS = {
    "1b_heads": (128, 84, 32, 32, 32, 128),
    "3b_heads": (96, 64, 24, 64, 64, 128),
    "8b_heads": (64, 128, 32, 64, 64, 160),
    "odd": (33, 17, 3, 5, 6, 7),
    "no_rope": (24, 16, 2, 8, 0, 16),
    "no_nope": (24, 16, 2, 0, 8, 16),
}


def make(dims, dtype, device, shape=(2, 5), q_a=True, norms=False, norm_dtype=None, maxpos=64):
    """Arguments of mla_project by name."""
    D, Rq, H, Dn, E, R = dims
    rank = Rq if q_a else D

    def randn(*size):
        return (torch.randn(size) / size[-1] ** 0.5).to(dtype).to(device)

    def norm(size):
        return (1 + 0.1 * torch.randn(size)).to(norm_dtype or dtype).to(device) if norms else None

    angle = torch.randn(maxpos, E // 2, device=device)
    return {
        "hidden": randn(*shape, D) * D**0.5,
        "q_a_weight": randn(Rq, D) if q_a else None,
        "q_b_weight": randn(H * (Dn + E), rank),
        "kv_a_weight": randn(R + E, D),
        "cos": 1.3 * angle.cos(),  # a magnitude as YaRN has
        "sin": 1.3 * angle.sin(),
        "positions": torch.randint(0, maxpos, shape, device=device),
        "num_heads": H,
        "q_a_norm_weight": norm(rank),
        "kv_a_norm_weight": norm(R),
    }


def wide(args):
    """In fp64 on the CPU; the tables stay fp32."""

    def convert(k, v):
        if not isinstance(v, torch.Tensor):
            return v
        return v.cpu().double() if v.is_floating_point() and k not in TABLES else v.cpu()

    return {k: convert(k, v) for k, v in args.items()}


def rejected(args, changes):
    return args | {k: change(args[k]) for k, change in changes.items()}


def with_cache(args, slots, pages=4, page=8, gap=3):
    """Adds a NaN cache with rows `gap` apart and the slots of every token."""
    depth, hidden = args["kv_a_weight"].size(0), args["hidden"]
    wide_cache = torch.full((pages, page + 1, depth + gap), float("nan")).to(hidden)
    slot_mapping = torch.tensor(slots, dtype=torch.int64, device=hidden.device).view(
        hidden.shape[:2]
    )
    return args | {"cache": wide_cache[:, :page, :depth], "slot_mapping": slot_mapping}

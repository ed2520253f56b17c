"""Spectra of an update that is a product of two thin factors, from small problems."""

import torch
from torch import Tensor

from opd_geometry.geometry.gram import EPS


def spectrum(left: Tensor, right: Tensor, k: int = 0) -> tuple[Tensor, Tensor | None]:
    """Singular values of a product, and its top-k right subspace.

    left @ right = Q_l (R_l R_r^T) Q_r^T, of which the middle is r x r.

    Args:
        left: (n_rows, r), float64.
        right: (r, n_cols), float64.
        k: dimension of the subspace, 0 for none.

    Returns:
        (min(r, n_rows, n_cols),) values, descending; (n_cols, k) with orthonormal
        columns, None where the product is of a rank below k or k is 0.

    >>> s, _ = spectrum(torch.eye(3)[:, :1].double(), 2 * torch.eye(4)[:1].double())
    >>> s.tolist()
    [2.0]
    """
    _, r_left = torch.linalg.qr(left, mode="r")
    q_right, r_right = torch.linalg.qr(right.T)
    _, values, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    # Two adapters of equal weights cancel but for rounding.
    scale = float(torch.linalg.norm(left) * torch.linalg.norm(right))
    values = torch.where(values > scale * max(values.shape) * EPS * 4, values, 0.0)
    if not k or len(values) < k or float(values[k - 1]) == 0.0:
        return values, None
    return values, q_right @ vh[:k].T

"""CVQ-VAE for Tersor."""

from tersor import hookimpl
from tersor_cvq_vae.cvq_vae import CVQVAE, CVQLayer

__all__ = ["CVQVAE", "CVQLayer"]


@hookimpl
def tersor_quantizer() -> type[CVQVAE]:
    return CVQVAE

"""Images made harder: common corruptions, and adversarial attacks."""

from moe_lib.robustness.attacks import fgsm, pgd, spsa
from moe_lib.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt

__all__ = ["CORRUPTIONS", "SEVERITIES", "corrupt", "fgsm", "pgd", "spsa"]

"""The error of the fused model. It stands alone because it travels with the saved weights, where the package is not."""


class FusionError(ValueError):
    """Models or tokenizers cannot be fused as asked; `str(error)` is one complete line for a person."""

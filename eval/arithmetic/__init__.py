"""The modular-arithmetic study: small networks that learn binary operations, alone, fused and merged."""

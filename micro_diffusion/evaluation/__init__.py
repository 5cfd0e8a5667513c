"""How good pictures are: metrics, benchmarks, and the small networks that judge emoji and scenes."""

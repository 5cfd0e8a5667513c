"""Pictures for metrics, and what metrics and benchmarks say of them."""

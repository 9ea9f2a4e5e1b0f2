"""How an adapted weight is applied: geometry of the host, factored steps, fused operation, cost model."""

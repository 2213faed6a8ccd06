"""The reference scenarios, played over gRPC on a system of their own."""

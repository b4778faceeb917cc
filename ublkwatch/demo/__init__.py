"""The reference server: shows the attach contract, and misbehaves on request for tests."""

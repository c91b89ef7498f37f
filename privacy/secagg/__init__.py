"""How do hospitals add up their updates so that nobody sees a single one? The protocol, without any I/O.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS 2017): double masking, the
variant against a malicious server, on a full graph of 3 to 50 sites. `docs/protocol.md` has the messages and the
argument. Read `plan`, `fixed`, `masks`, `shamir`, `keys`, `messages`, then `site` and `coordinator`.
"""

"""The ground floor of what may leave a hospital, and the proof of it: identities, the study contract, the airlock.

This floor knows nothing of networks, transports or neural networks, so that it can be audited by itself.
"""

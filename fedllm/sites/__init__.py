"""Sites - what a run across organisations needs beside an engine: a manifest, each site's policy, an audit log.

The coordinator signs a :mod:`~fedllm.sites.manifest`. Each site holds it against its own
:mod:`~fedllm.sites.policy` before anything is read, and asks the policy again for every upload. Both ends write an
:mod:`~fedllm.sites.audit` log, and the logs can be held against each other. Nothing here knows an engine.
"""

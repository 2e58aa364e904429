"""NVIDIA FLARE engine - the same recipe across organisations: one server, one worker process at each site.

`parts` and `pipe` are what travels between server and site, and between a site and its worker; `pieces` is how FLARE
carries what is large. `worker` is the process that holds model and data, `keeper` starts and feeds it, `site` is the
executor inside FLARE's client. `engine` is the server's half of :class:`fedllm.core.server.Engine`, `server` the
controller inside FLARE's server. `trust` signs and checks a run's manifest, `gate` holds it against the site's policy,
`record` says what the audit logs hold. `job`, `kits` and `session` write jobs and certificates with FLARE's policies,
and run them. Nothing else of fedllm imports nvflare.
"""

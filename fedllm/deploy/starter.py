"""Starter - the policy that a site begins with: it allows nothing, and says what could stand there."""

from __future__ import annotations

TEXT = """\
# What this site allows. Whatever does not stand here is refused; a line that begins with '#' allows nothing.
# Remove the '#' where you agree, and change what stands behind the colon.
site: SITE

# Who may start a run: the e-mail addresses in their certificates.
# coordinators: [ada@hub.org]

# Methods, what a run may be for, and the names of data sets that it may ask for.
# methods: [fedavg, fedprox, fedit]
# purposes: [research]
# data_sets: [notes]

# Rounds and sites of a run at most.
# max_rounds: 50
# max_clients: 10

# Days since a run was signed at most, also where it goes on.
# max_age: 90

# When this site works: always, or windows in UTC, such as ['18:00-06:00'].
# hours: always

# What is answered: work (training), evaluate and evaluate_base (measuring the trained and the base model).
# ops: [work, evaluate, evaluate_base]

# What may leave: 'update' is the trained adapter, 'header' weight, metrics, numbers and names. Texts that a method
# sends, such as answers of a model, are a part of their own ('texts'). How many bytes of it.
# parts: [header, update]
# max_egress_round: 100_000_000
# max_egress_run: 2_000_000_000

# Modes that a run must have. For example a secure sum, so that nobody sees this site's update alone:
# require: {secure: {minimum: 3}}

# remote_code: false    # code that comes with a model
# attacks: false        # experiments that make clients harmful
"""
"""The file; SITE is to be replaced by the name of the site."""


def policy(site: str) -> str:
    """The file for a site."""
    return TEXT.replace("SITE", site)

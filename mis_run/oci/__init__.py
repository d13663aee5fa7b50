"""``mis-oci-runtime``: the same guards for containers that an engine makes (docs/docker.md).

`main` is the command line, `create` the one command that is more than the OCI runtime's own,
`supervisor` what then guards the container until it ends.
"""

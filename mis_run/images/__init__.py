"""Images as the agent's root (``--image``): from an engine, an OCI layout or an archive to folders.

`words` reads what the user wrote, `sources` finds the image and its blobs, `cache` keeps each layer
unpacked once, `accounts` knows the image's users.  Imported only when ``--image`` is given.
Out of scope: registries; an engine, skopeo or buildah pull better than we would.
"""

"""Who is who, and what only they can read: keys, certificates, signed asks, sealed answers."""

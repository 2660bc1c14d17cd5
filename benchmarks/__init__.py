"""Side by side measurements of pruneutils and its peers: `make bench` prints one table and writes it here."""

"""A certificate for 127.0.0.1 that its maker trusts."""

import subprocess
from pathlib import Path


def make_certificate(home: Path) -> tuple[Path, Path]:
    """Return a file with key and certificate, for a server, and one with the certificate, for those who trust it."""
    both, trusted = home / "certificate.pem", home / "certificate.crt"
    if not both.exists():
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=127.0.0.1",
             "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", both, "-out", trusted],
            check=True, capture_output=True,
        )  # fmt: skip
        with both.open("a") as bundle:
            bundle.write(trusted.read_text())
    return both, trusted

"""The authority of a federation, the TLS certificate of its server, and what can be wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.errors import KeysError
from fedtune.security.addresses import as_ip, host_name
from fedtune.security.keyfiles import new_tls_key

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397  # a common upper bound for TLS certificates is 398
MINUTE = "%Y-%m-%d %H:%M"
ALWAYS = ("localhost", "127.0.0.1", "::1")
SLACK = timedelta(hours=12)  # of the clocks of clients that are behind


@dataclass(frozen=True)
class Issued:
    """A certificate (PEM) and its private key."""

    pem: bytes
    key: EllipticCurvePrivateKey


def make_authority(days: int = AUTHORITY_DAYS, now: datetime | None = None) -> Issued:
    key, name = new_tls_key(), _name("fedtune authority")
    builder = _builder(name, name, key, now or datetime.now(UTC), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
    return Issued(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), key)


def make_server_certificate(
    authority: Issued, names: Iterable[str], days: int = SERVER_DAYS, now: datetime | None = None
) -> Issued:
    """For these names and addresses, and for this machine's own."""
    hosts = list(dict.fromkeys([*(host_name(name) for name in names), *ALWAYS]))
    signer, key = _read(authority.pem), new_tls_key()
    builder = _builder(_name("fedtune server"), signer.subject, key, now or datetime.now(UTC), days, signer.not_valid_after_utc)
    builder = builder.add_extension(x509.SubjectAlternativeName([_general(host) for host in hosts]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    identifier = signer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
    return Issued(builder.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM), key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: EllipticCurvePrivateKey,
    now: datetime,
    days: int,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SLACK)
        .not_valid_after(min(end, latest or end))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general(host: str) -> x509.GeneralName:
    ip = as_ip(host)
    return x509.IPAddress(ip) if ip else x509.DNSName(host)


def _usage(**on: bool) -> x509.KeyUsage:
    off = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return x509.KeyUsage(**(off | on))


def certificate_problem(pem: bytes, ca_pem: bytes, host: str, now: datetime | None = None) -> str | None:
    """Why a client at this time should not trust this certificate of `host`, and what to do; None where it should."""
    certificate, authority, now = _read(pem), _read(ca_pem), now or datetime.now(UTC)
    return (
        _other_authority(certificate, authority)
        or _date_problem("the authority's certificate", "`fedtune keys init` in a new folder, and new bundles", authority, now)
        or _date_problem("the server's certificate", "`fedtune keys rotate server` on the coordinator", certificate, now)
        or _other_host(certificate, host)
    )


def _other_authority(certificate: x509.Certificate, authority: x509.Certificate) -> str | None:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return (
            "the server's certificate is not by the authority in ca.pem: this bundle is for another server, or is older than "
            "the server's keys; ask the coordinator for a new one (`fedtune keys rotate client NAME`)"
        )
    return None


def _date_problem(what: str, renewal: str, certificate: x509.Certificate, now: datetime) -> str | None:
    if now > certificate.not_valid_after_utc:
        return f"{what} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; type {renewal}"
    if now < certificate.not_valid_before_utc:
        begin, here = f"{certificate.not_valid_before_utc:{MINUTE}}", f"{now:{MINUTE}}"
        return f"{what} is valid from {begin} UTC, and this machine's clock says {here}: set the clock"
    return None


def _other_host(certificate: x509.Certificate, host: str) -> str | None:
    names = server_names(certificate)
    if host_name(host) in names:
        return None
    wanted = " ".join([host, *(name for name in names if name not in ALWAYS)])
    return (
        f"the server's certificate is not for {host} but for {', '.join(names)}; go to one of these, "
        f"or type `fedtune keys rotate server {wanted}` on the coordinator"
    )


def server_names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def names_in(pem: bytes) -> list[str]:
    return server_names(_read(pem))


def expires(pem: bytes) -> datetime:
    return _read(pem).not_valid_after_utc


def days_left(pem: bytes, now: datetime | None = None) -> int:
    """Whole days; negative when it has expired."""
    return (expires(pem) - (now or datetime.now(UTC))).days


def belongs(pem: bytes, key: EllipticCurvePrivateKey) -> bool:
    public = _read(pem).public_key()
    return isinstance(public, EllipticCurvePublicKey) and public == key.public_key()


def _read(pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise KeysError(f"that is not a certificate in PEM form: {error}") from error

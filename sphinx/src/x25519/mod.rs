//! X25519 (RFC 7748), several multiplications at once.
//!
//! Vectors hold one field element in each of their lanes, and one Montgomery ladder runs over all of
//! them: [`ladder`] is generic over the field, [`field25`] and [`field51`] are generic over the
//! lanes, and `x86` has the lanes of CPUs. Tests run all of it over lanes in plain Rust, too.
//!
//! A ladder takes as long for one lane as for all of them, so what is left over is multiplied one
//! at a time when that is faster.

#[cfg(any(target_arch = "x86_64", test))]
mod field;
#[cfg(any(target_arch = "x86_64", test))]
mod field25;
#[cfg(any(target_arch = "x86_64", test))]
mod field51;
#[cfg(any(target_arch = "x86_64", test))]
mod ladder;
#[cfg(any(target_arch = "x86_64", test))]
mod lanes;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use aws_lc_rs::agreement::{PrivateKey, UnparsedPublicKey, X25519, agree};
use curve25519_dalek::scalar::clamp_integer;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::Backend;
#[cfg(test)]
use crate::self_check::Fault;

/// Fewest multiplications for which the four lanes of AVX2 are faster than one after the other.
/// Measured on an AMD EPYC 7003: 77 µs for the lanes, 36 µs for one.
#[cfg(target_arch = "x86_64")]
const MIN_AVX2: usize = 3;
/// The same for the eight lanes of AVX-512. Not measured with this code: a trial of such a ladder took
/// 38 µs where AWS-LC took 32 µs for one.
#[cfg(target_arch = "x86_64")]
const MIN_AVX512: usize = 2;

/// X25519 of each scalar and point, in their order: 32 bytes each, as in RFC 7748 section 5.
///
/// Scalars are clamped, the top bits of points are ignored; the product with a point of low order is
/// zero. The time that it takes, and the addresses that it touches, depend on nothing but the number
/// of multiplications.
#[must_use]
pub fn x25519(operations: &[(&[u8; 32], &[u8; 32])]) -> Zeroizing<Vec<[u8; 32]>> {
    let mut products = Zeroizing::new(Vec::with_capacity(operations.len()));
    match Backend::current() {
        Backend::Reference => products.extend(
            operations.iter().map(|(scalar, point)| x25519_dalek::x25519(**scalar, **point)),
        ),
        #[cfg(target_arch = "x86_64")]
        Backend::Avx2 if has_avx2() => in_lanes(operations, MIN_AVX2, &mut products, |s, p| {
            // SAFETY: the CPU has AVX2.
            #[expect(unsafe_code, reason = "vector instructions")]
            unsafe {
                x86::ladder_avx2(s, p)
            }
        }),
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 if has_avx512() => {
            in_lanes(operations, MIN_AVX512, &mut products, |s, p| {
                // SAFETY: the CPU has AVX-512F and AVX-512 IFMA.
                #[expect(unsafe_code, reason = "vector instructions")]
                unsafe {
                    x86::ladder_avx512(s, p)
                }
            })
        }
        _ => products.extend(operations.iter().map(|(scalar, point)| single(scalar, point))),
    }
    #[cfg(test)]
    if Fault::Multiplication.is_injected()
        && let Some(last) = products.last_mut()
    {
        last[0] ^= 1;
    }
    products
}

/// Whether a product is zero, as all are of a point of low order: no secret. How long it takes does
/// not depend on the product.
pub(crate) fn is_zero(product: &[u8; 32]) -> bool {
    product.ct_eq(&[0; 32]).into()
}

/// The public key of a secret one: X25519 with the base point.
pub(crate) fn public_key(secret: &[u8; 32]) -> [u8; 32] {
    let key = PrivateKey::from_private_key(&X25519, secret).expect("any 32 bytes are a key");
    let public = key.compute_public_key().expect("every key has a public one");
    public.as_ref().try_into().expect("a public key has 32 bytes")
}

#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
}

#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512() -> bool {
    has_avx2() && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512ifma")
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn has_avx2() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn has_avx512() -> bool {
    false
}

/// Runs `ladder` over `N` multiplications at a time, and those that are fewer than `min` in the end
/// one at a time.
#[cfg(any(target_arch = "x86_64", test))]
fn in_lanes<const N: usize>(
    operations: &[(&[u8; 32], &[u8; 32])],
    min: usize,
    products: &mut Vec<[u8; 32]>,
    ladder: impl Fn(&[[u8; 32]; N], &[[u8; 32]; N]) -> [[u8; 32]; N],
) {
    for group in operations.chunks(N) {
        if group.len() < min {
            products.extend(group.iter().map(|(scalar, point)| single(scalar, point)));
            continue;
        }
        let (mut scalars, mut points) = (Zeroizing::new([[0; 32]; N]), [[0; 32]; N]);
        for (i, (scalar, point)) in group.iter().enumerate() {
            scalars[i] = clamp_integer(**scalar);
            points[i] = **point;
        }
        let all = Zeroizing::new(ladder(&scalars, &points));
        products.extend_from_slice(&all[..group.len()]);
    }
}

/// One multiplication. AWS-LC's code in assembly takes half as long as that of x25519-dalek.
fn single(scalar: &[u8; 32], point: &[u8; 32]) -> [u8; 32] {
    let key = PrivateKey::from_private_key(&X25519, scalar).expect("any 32 bytes are a key");
    let mut product = [0; 32];
    // It refuses to hand out the one shared secret that everybody knows, which is zero. Callers that
    // need a secret refuse zero, however it came about.
    let _ = agree(&key, UnparsedPublicKey::new(&X25519, point), (), |shared| {
        product.copy_from_slice(shared);
        Ok(())
    });
    product
}

//! Lists in pages. A page begins after the key of the last item of the page before it, so that what is made or deleted
//! between two calls neither hides an item nor shows one twice.

use prost::Message;
use tonic::Status;

use super::status::invalid;

/// Most items of a page.
pub const PAGE_ITEMS_MAX: usize = 1000;
/// A page that has grown to this is full, also with fewer items: it must stay below the largest message.
const PAGE_BYTES: usize = 512 << 10;
/// Longest token that one of ours can be: the key of an item, its length twice.
const TOKEN_BYTES_MAX: usize = 512;

/// Which page is asked for.
#[derive(Debug)]
pub struct Page {
    items: usize,
    after: Option<String>,
}

impl Page {
    /// From a request's `page_size` and `page_token`.
    pub fn asked(size: u32, token: &str) -> Result<Self, Status> {
        let items = match usize::try_from(size) {
            Ok(size @ 1..=PAGE_ITEMS_MAX) => size,
            _ => PAGE_ITEMS_MAX,
        };
        let after = match token {
            "" => None,
            token => Some(key_of(token).ok_or_else(|| {
                invalid("page_token is none that this service gave; ask for the first page with an empty one")
            })?),
        };
        Ok(Self { items, after })
    }

    /// Whether it is the first.
    pub fn is_first(&self) -> bool {
        self.after.is_none()
    }

    /// The page's items as messages, and the token of the next page (empty: there is none). `items` come in the order of
    /// their keys.
    pub fn of<T, M: Message>(
        &self,
        items: impl IntoIterator<Item = T>,
        key: impl Fn(&T) -> String,
        out: impl Fn(T) -> M,
    ) -> (Vec<M>, String) {
        let rest = items.into_iter().map(|item| (key(&item), item));
        let rest = rest.filter(|(key, _)| self.after.as_ref().is_none_or(|after| key > after));
        let (mut page, mut bytes, mut last) = (Vec::new(), 0_usize, String::new());
        for (key, item) in rest {
            if page.len() == self.items || bytes >= PAGE_BYTES {
                return (page, token_of(&last));
            }
            let message = out(item);
            bytes = bytes.saturating_add(message.encoded_len());
            page.push(message);
            last = key;
        }
        (page, String::new())
    }
}

fn token_of(key: &str) -> String {
    key.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn key_of(token: &str) -> Option<String> {
    if token.len() > TOKEN_BYTES_MAX || !token.len().is_multiple_of(2) || !token.is_ascii() {
        return None;
    }
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let bytes: Option<Vec<u8>> = token.as_bytes().chunks(2).map(byte).collect();
    String::from_utf8(bytes?).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page(size: u32, token: &str, items: impl IntoIterator<Item = u32>) -> (Vec<u32>, String) {
        Page::asked(size, token).expect("a page").of(items, |item| format!("{item:04}"), |item| item)
    }

    #[test]
    fn pages_go_on_after_the_last_item_even_if_it_is_gone() {
        let (first, next) = page(2, "", [1, 3, 5, 7]);
        assert_eq!(first, [1, 3]);
        let (second, next) = page(2, &next, [1, 4, 5, 7]);
        assert_eq!(second, [4, 5]);
        let (third, next) = page(2, &next, [1, 4, 5, 7]);
        assert_eq!((third.as_slice(), next.as_str()), ([7].as_slice(), ""));
    }

    #[test]
    fn no_page_is_too_large() {
        for size in [0, 1001, u32::MAX] {
            let (items, next) = page(size, "", 0..1500);
            assert_eq!((items.len(), next.is_empty()), (1000, false));
        }
        let large = Page::asked(0, "").expect("a page");
        let (items, next) = large.of(0..5_u32, u32::to_string, |_| "x".repeat(400 << 10));
        assert_eq!((items.len(), next.is_empty()), (2, false));
    }

    proptest! {
        #[test]
        fn any_token_is_taken_or_refused(token in ".{0,40}") {
            if let Ok(page) = Page::asked(3, &token) {
                prop_assert!(page.of(0..5_u32, u32::to_string, |item| item).0.len() <= 3);
            }
        }

        #[test]
        fn tokens_carry_any_key(key in ".{1,60}") {
            prop_assert_eq!(key_of(&token_of(&key)), Some(key));
        }
    }
}

//! Request heads that are read without Pingora say what Pingora would read in them.

use http::header::{CONNECTION, HOST};
use http::{HeaderName, HeaderValue};
use pingora_http::RequestHeader;
use pingora_slice::fields::Fields;
use pingora_slice::head::{Head, read};
use pingora_slice::url::of_request;

/// Fields that Pingora reads: more than a plain head has.
const FIELDS_MAX: usize = 256;

/// What a connection has read.
pub fn check(data: &[u8]) {
    let Some(Head { length, plain }) = read(data) else {
        return;
    };
    assert!(length <= data.len());
    let Some(plain) = plain else { return };
    // What follows it changes nothing.
    let alone = read(&data[..length]).expect("it is all there");
    assert_eq!(alone.length, length);

    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut parsed = httparse::Request::new(&mut fields);
    let parsed_length = parsed.parse(data).expect("a head").unwrap();
    assert_eq!(parsed_length, length);
    let target = parsed.path.expect("a target").as_bytes();
    let method = parsed.method.expect("a method");
    let mut its = RequestHeader::build_no_case(method, target, None).expect("a request");
    for field in parsed.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes()).expect("a name");
        let value = HeaderValue::from_bytes(field.value).expect("a value");
        its.append_header(name, value).expect("a field");
    }
    assert_eq!(plain.is_get, method == "GET");
    assert_eq!(plain.url(), of_request(&its));
    assert_eq!(*plain.to_map(), its.headers);
    assert_eq!(its.headers.get_all(HOST).iter().count(), 1);
    let said = its.headers.get(CONNECTION).map(HeaderValue::as_bytes);
    let closes = said.is_some_and(|said| said.eq_ignore_ascii_case(b"close"));
    assert_eq!(plain.is_last, closes);
    for name in its.headers.keys() {
        assert!(plain.lines(name).eq(its.headers.lines(name)), "{name}");
    }
}

# The image for those who can reach a registry. Without one, `make image`
# makes the same from locally built binaries.
FROM rust:1-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends cmake && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo build --locked --release --package pingora-slice --package pingora-slice-client

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --no-create-home pingora-slice && \
    mkdir -p /etc/pingora-slice/tls /etc/pingora-slice/nodes/1 /etc/pingora-slice/nodes/2 /etc/pingora-slice/nodes/3 /var/cache/pingora-slice /var/lib/pingora-slice && \
    chown -R 10001:10001 /etc/pingora-slice /var/cache/pingora-slice /var/lib/pingora-slice
COPY --from=build /src/target/release/pingora-slice /src/target/release/pingora-slicectl /usr/local/bin/
USER 10001:10001
WORKDIR /etc/pingora-slice
EXPOSE 8080/tcp 9090/tcp 9091/tcp 7001/udp 7002/udp
ENTRYPOINT ["/usr/local/bin/pingora-slice"]
